"""How a module runs in a batch whose examples have adapters of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.core.base import Base, is_watched
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.routing import Routing
from lightning_peft.core.rows import IndivisibleError, Rows, Split, join, refuse_handing_on, refuse_indivisible, take

if TYPE_CHECKING:
    from lightning_peft.core.adapted import Site


def by_rows(site: Site, routing: Routing, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each example through the layer of its own adapter.

    Args:
        site: the place of the adapted module.
        routing: which adapters run.
        rows: the adapter of each example.
        args: the module's inputs.
        kwargs: its named inputs.

    Raises:
        RuntimeError: if the examples or the layers cannot be parted; it names the adapters.
    """
    here = {n: site.layers[n] for n in rows.methods if n in site.layers}
    if not here:
        return site.base(*args, **kwargs)
    for name, layer in here.items():
        if not layer.divisible:
            refuse_handing_on(name, rows.methods[name])
    try:
        split = rows.split(site.base.module, args, kwargs)
        output = _together(site, rows, here, args, kwargs)
        return _parted(site, routing, split, args, kwargs) if output is NotImplemented else output
    except IndivisibleError as error:
        raise RuntimeError(f"{error}; {rows.apart(here)}") from None


def _together(
    site: Site, rows: Rows, here: dict[str, AdapterLayer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """All examples in one call, if the layers are of one kind that can do that and nobody watches one of them."""
    layers = here.values()
    kinds = {type(layer) for layer in layers}
    if len(kinds) > 1 or any(is_watched(layer) for layer in layers):
        return NotImplemented
    by_example: list[Any] = [here.get(n) if n is not None else None for n in rows.names]
    return kinds.pop().together(by_example, site.base, *args, **kwargs)


def _parted(site: Site, routing: Routing, split: Split, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The original forward once for all examples, and around each group of them its adapter's layer."""
    whole = _Once(functools.partial(_whole, site, routing, args, kwargs))
    outputs, parts = [], []
    for name, index in split.groups.items():
        inputs = take((args, kwargs), index, split.total)
        part = _Part(site, name, whole, inputs, index, split.total)
        layer = None if name is None else site.layers.get(name)
        # what a layer calls beside its base, such as a projection inside, gets this group's rows alone
        with site.switch.pinned(Routing(() if name is None else (name,))):
            outputs.append((part if layer is None else functools.partial(layer, part))(*inputs[0], **inputs[1]))
        parts.append(part)
        if not part.ran:  # a copy of the module ran instead, on what is its part of the inputs
            refuse_indivisible(site.base.module, inputs, len(index))
    if all(output is part.given for output, part in zip(outputs, parts, strict=True)):
        return whole()
    return join(site.base.module, outputs, split)


def _whole(site: Site, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with site.switch.pinned(routing):
        return site.base(*args, **kwargs)


@functools.cache
def untraced() -> Callable[..., Any]:
    """`by_rows` without torch.compile, which leaves its graph in an ``adapter_names`` block and goes on there."""
    return torch.compiler.disable(by_rows)  # type: ignore[no-untyped-call, no-any-return]


class _Once:
    """A call that is made when its result is first asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.result: Any = _NOTHING

    def __call__(self) -> Any:
        if self.result is _NOTHING:
            self.result = self.call()
        return self.result


class _Part(Base):
    """The original forward for some examples of a batch: their part of what it gives for the whole batch.

    With inputs that a layer changed it runs on these alone, with their adapter in whatever lies inside it.
    """

    def __init__(
        self,
        site: Site,
        name: str | None,
        whole: Callable[[], Any],
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        index: Tensor,
        count: int,
    ) -> None:
        self.__dict__.update(site.base.__dict__)
        self.site, self.name, self.whole, self.inputs, self.index, self.count = site, name, whole, inputs, index, count
        self.ran = False
        self.given: Any = _NOTHING

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ran = True
        before, named = self.inputs
        if len(args) == len(before) and kwargs.keys() == named.keys():
            pairs = [*zip(args, before, strict=True), *((kwargs[k], named[k]) for k in named)]
            if all(now is then for now, then in pairs):
                if self.given is _NOTHING:
                    self.given = take(self.whole(), self.index, self.count)
                return self.given
        refuse_indivisible(self.module, (args, kwargs), len(self.index))
        with self.site.switch.pinned(Routing(() if self.name is None else (self.name,))):
            return self.site.base(*args, **kwargs)

    def plain_weight(self, x: Tensor) -> Tensor | None:
        """None: the whole batch goes through the forward at once."""
        return None


_NOTHING = object()
