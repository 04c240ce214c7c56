"""A batch in which each example has an adapter of its own: parting what goes in, putting together what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.problems import an


class IndivisibleError(RuntimeError):
    """What a batch of several adapters meets where its examples cannot be told apart."""


class Split(NamedTuple):
    """The examples of one call by adapter.

    Attributes:
        total: how many rows the call has along dim 0.
        groups: the rows' numbers by adapter; None is the base.
        order: where in the groups, one behind the other, each row is.
    """

    total: int
    groups: dict[str | None, Tensor]
    order: Tensor


@dataclass(frozen=True)
class Rows:
    """The adapter of each example.

    Args:
        names: one an example; None is the base.
        repeats: how many consecutive rows an example may have instead of one, as beams do.
        methods: the name of each adapter's method, for errors.
    """

    names: tuple[str | None, ...]
    repeats: int = 1
    methods: dict[str, str] = field(default_factory=dict, compare=False)
    _splits: dict[tuple[int, torch.device], Split] = field(default_factory=dict, compare=False, repr=False)

    def split(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Split:
        """The examples in the inputs of one module.

        Args:
            module: the module, for what it says of its inputs.
            args: its inputs.
            kwargs: its named inputs.

        Raises:
            IndivisibleError: if the inputs do not have a row, or the repeats, for each example along dim 0.
        """
        first = next((t for t in _leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()), None)
        count = None if first is None else first.shape[0]
        if first is None or count not in (len(self.names), len(self.names) * self.repeats):
            _refuse(
                module,
                f"was called with {count or 'no'} rows along dim 0 for {len(self.names)} names; rows must be examples, "
                "and where each has several, as beams do, say how many (repeats=num_beams)",
            )
        if getattr(module, "batch_first", True) is False:
            _refuse(module, "does not have the batch first (batch_first=False)")
        key = (first.shape[0], first.device)
        if key not in self._splits:
            self._splits[key] = self._made(*key)
        return self._splits[key]

    def apart(self, adapters: Iterable[str]) -> str:
        """The end of a refusal's sentence: which adapters the module has layers of, and the way out.

        Args:
            adapters: their names.
        """
        named = [f"{n!r} ({self.methods[n]})" for n in adapters]
        if len(named) == 1:
            return f"{named[0]} has a layer there, so run its rows apart from the others"
        return f"{', '.join(named[:-1])} and {named[-1]} have layers there, so run the rows of each apart"

    def _made(self, count: int, device: torch.device) -> Split:
        each = count // len(self.names)
        rows: dict[str | None, list[int]] = {}
        for number in range(count):
            rows.setdefault(self.names[number // each], []).append(number)
        with torch.inference_mode(False):
            groups = {name: torch.tensor(numbers, device=device) for name, numbers in rows.items()}
            return Split(count, groups, torch.cat(list(groups.values())).argsort())


def take(value: Any, index: Tensor, count: int) -> Any:
    """Some rows of whatever a module takes or gives.

    Args:
        value: a tensor, or tuples, lists and mappings of tensors; anything else is handed on as it is.
        index: the rows.
        count: how many rows there are: only tensors of so many have rows.
    """
    return mapped(value, lambda tensor: _taken(tensor, index, count))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """What a module takes or gives with something else in place of each of its leaves.

    Args:
        value: tuples, lists and mappings, one in the other, of anything.
        change: gives for each thing that is none of them what takes its place.
    """
    if isinstance(value, Mapping):
        return _filled(value, {k: mapped(v, change) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return _sequence(value, [mapped(v, change) for v in value])
    return change(value)


def join(module: Module, parts: Sequence[Any], split: Split) -> Any:
    """The outputs of all groups as those of one batch.

    Args:
        module: the module, for errors.
        parts: an output for each group.
        split: the groups.

    Raises:
        IndivisibleError: if they hold something that has no rows and is not the same for all.
    """
    first = parts[0]
    if all(part is first for part in parts):
        return first
    if all(isinstance(part, Tensor) for part in parts):
        sizes = [len(index) for index in split.groups.values()]
        fits = all(part.dim() and part.shape[0] == n for part, n in zip(parts, sizes, strict=True))
        if not fits or len({(part.shape[1:], part.dtype) for part in parts}) > 1:
            shapes = [tuple(part.shape) for part in parts]
            _refuse(module, f"gives tensors of the shapes {shapes} for {sizes} rows (a loss is such: pass no labels)")
        return torch.cat(list(parts)).index_select(0, split.order.to(first.device))
    alike = all(type(part) is type(first) for part in parts)
    if alike and isinstance(first, Mapping) and all(part.keys() == first.keys() for part in parts):
        return _filled(first, {k: join(module, [part[k] for part in parts], split) for k in first})
    if alike and isinstance(first, (tuple, list)) and len({len(part) for part in parts}) == 1:
        return _sequence(first, [join(module, inner, split) for inner in zip(*parts, strict=True)])
    if isinstance(first, (bool, int, float, str)) and all(part == first for part in parts):
        return first
    _refuse(module, f"gives each adapter {an(type(first).__name__)} of its own (for caches pass use_cache=False)")


def refuse_handing_on(adapter: str, method: str) -> NoReturn:
    """Refuses an adapter whose layers hand something on from one to the next, which parting the batch would cut.

    Args:
        adapter: its name.
        method: its method's.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"one adapter an example: the adapter {adapter!r} ({method}) cannot be mixed in a batch with others, since its "
        "layers hand on from one to the next; run its rows apart"
    )


def refuse_indivisible(module: Module, inputs: Any, rows: int) -> None:
    """Refuses inputs of which a part of the examples cannot have a part.

    Args:
        module: the module, for errors.
        inputs: what it would be called with for a part of the examples.
        rows: how many rows that part has.

    Raises:
        IndivisibleError: if something beside tensors and plain values is among them, such as a cache, or a vector that
            may be one value an example or one a token.
    """
    leaves = list(_leaves(inputs))
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, torch.dtype, torch.device)) and leaf is not None:
            _refuse(module, f"would have to share {an(type(leaf).__name__)} between its adapters")
    dims = {leaf.dim() for leaf in leaves if isinstance(leaf, Tensor)}
    if max(dims, default=0) > 1 and any(isinstance(x, Tensor) and tuple(x.shape) == (rows,) for x in leaves):
        _refuse(module, f"takes a vector of {rows}, which may be one value an example or one a token")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _taken(leaf: Any, index: Tensor, count: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != count:
        return leaf
    return leaf.index_select(0, index.to(leaf.device))


def _filled(like: Any, values: dict[Any, Any]) -> Any:
    """A mapping of the same kind, such as transformers' outputs, with other values."""
    if type(like) is dict:
        return values
    twin = copy.copy(like)
    for key, value in values.items():
        twin[key] = value
    return twin


def _sequence(like: Any, values: list[Any]) -> Any:
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def _refuse(module: Module, why: str) -> NoReturn:
    raise IndivisibleError(f"one adapter an example: {an(type(module).__name__)} {why}")
