"""Folding adapters' changes of weights into the base and taking them back, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import Adapters, refuse_in_use, require_adapters
from lightning_peft.core.changed_weights import changed_weights, joined
from lightning_peft.core.fingerprint import renew_digests
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.inject import eject
from lightning_peft.core.matching import base_modules, is_within
from lightning_peft.core.method import Residual
from lightning_peft.core.quantized import Rounding, move, take_place
from lightning_peft.core.tree import AdapterTree


def merge(model: Module, name: str, *, keep_originals: bool = True) -> None:
    """Adds an adapter's deltas to the weights; the adapter is inactive as long as it is merged.

    Quantized weights are quantized again, and a warning says what that loses.

    Several merged adapters change a weight in the order of their merging. The sum is taken in float32, or what is
    wider, and cast once, however many are merged. Each merged weight is a new parameter in place of the original:
    a weight tied to another module is untied, so the other end is not changed and the change is not made twice;
    where both ends change alike the tie stays.

    Args:
        model: the root.
        name: the adapter's name. Merging a merged adapter does nothing more than to drop its originals if asked to.
        keep_originals: whether the originals wait on the CPU, so that `unmerge` can give them back.

    Raises:
        ValueError: if the method cannot be merged, the adapter is not active or does not run innermost, a weight
            trains in place or is not there as it is, or a value is not finite; nothing is changed then.
    """
    adapters = require_adapters(model, [name])
    waiting = [n for n, kept in adapters.merged.items() if kept and n != name]
    if not keep_originals and waiting:
        raise ValueError(
            f"the originals of the merged adapter {waiting[0]!r} wait for its unmerge(), so {name!r} cannot be merged "
            f"without its own; unmerge {waiting[0]!r} first, or merge it with keep_originals=False too"
        )
    if name in adapters.merged:
        if not keep_originals:
            renew_digests(adapters, base_parameters(model), adapters.originals)
            adapters.originals.clear()
            adapters.merged[name] = False
        return
    _check(model, adapters, name)
    rounding = Rounding()
    if keep_originals:
        _make_merged(model, adapters, (*waiting, name), rounding)
    else:
        changes = functools.partial(
            changed_weights, model, adapters, [name], adapters.trees[name].layers_by_module, rounding
        )
        for _ in changes():
            pass  # whatever is refused is refused here, before the first original is gone
        changed = []
        for key, value in changes():
            _exchange(model, key, value)
            changed.append(key)
        renew_digests(adapters, base_parameters(model), changed)
    method = adapters.trees[name].record.method
    rounding.warn(bound=isinstance(method, Residual) and method.needs_codes)
    adapters.merged[name] = keep_originals
    adapters.switch.active = tuple(n for n in adapters.switch.active if n != name)


def unmerge(model: Module, name: str) -> None:
    """Puts the original parameters back, the very same objects, and activates the adapter again as the innermost.

    Args:
        model: the root.
        name: the adapter's name. Unmerging an unmerged adapter does nothing.

    Raises:
        ValueError: if another adapter was merged over it into the same weights.
        RuntimeError: if it was merged without keeping the originals.
    """
    adapters = require_adapters(model, [name])
    if name not in adapters.merged:
        return
    _require_originals(adapters, name, "unmerge()")
    order = list(adapters.merged)
    places = adapters.trees[name].layers_by_module.keys()
    for later in order[order.index(name) + 1 :]:
        if places & adapters.trees[later].layers_by_module.keys():
            raise ValueError(f"the adapter {later!r} was merged over {name!r} into the same weights; unmerge it first")
    _make_merged(model, adapters, [n for n, kept in adapters.merged.items() if kept and n != name], Rounding())
    del adapters.merged[name]
    adapters.switch.active = (name, *adapters.switch.active)


def fold(model: Module, name: str) -> None:
    """Merges for good and takes the adapter out.

    Args:
        model: the root.
        name: the adapter's name.

    Raises:
        ValueError: as `merge` does.
    """
    merge(model, name, keep_originals=False)
    adapters = require_adapters(model, [name])
    del adapters.merged[name]
    record = adapters.trees[name].record
    record.originals = {}
    eject(model, name)
    renew_digests(adapters, base_parameters(model), record.in_place)


@contextmanager
def unmerged(model: Module) -> Iterator[None]:
    """Puts all originals in place for as long as a ``with`` block lasts, and the merged weights back after it.

    Args:
        model: the root.

    Raises:
        RuntimeError: if an adapter was merged without keeping the originals.
    """
    adapters = require_adapters(model)
    for name in adapters.merged:
        _require_originals(adapters, name, "disabled()")
    merged = {key: _exchange(model, key, original) for key, original in adapters.originals.items()}
    try:
        yield
    finally:
        for key, value in merged.items():
            _exchange(model, key, value)
        _wait_on_cpu(model, adapters)


def ties(model: Module) -> set[frozenset[str]]:
    """The names of the base's parameters that are one, a set for each.

    Args:
        model: the root.
    """
    held: dict[int, set[str]] = {}
    for place, module in base_modules(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), set()).add(joined(place, key))
    return {frozenset(names) for names in held.values() if len(names) > 1}


def _check(model: Module, adapters: Adapters, name: str) -> None:
    refuse_in_use(adapters, name)
    active, trees = adapters.switch.active, adapters.trees
    if name not in active:
        raise ValueError(f"the adapter {name!r} is not active; activate it before merging")
    places = trees[name].layers_by_module.keys()
    for inner in active[: active.index(name)]:
        shared = sorted(places & trees[inner].layers_by_module.keys())
        if shared:
            raise ValueError(
                f"the adapter {inner!r} runs inside {name!r} at {shared[0] or 'the whole model'!r}, and merging makes "
                f"{name!r} the inner one; merge {inner!r} first, or choose that order: "
                f"activate(model, {name!r}, {inner!r})"
            )
    for other in (*active, *adapters.merged):
        nested = _nested(trees[name], trees[other]) or _nested(trees[other], trees[name])
        if other != name and nested:
            raise ValueError(
                f"{nested!r} is adapted inside a module that another of the adapters {name!r} and {other!r} trains as "
                "a copy, so they do not act together; activate one of them alone before merging"
            )


def _nested(outer: AdapterTree, inner: AdapterTree) -> str | None:
    """A module that one adapter adapts below one that another trains as a copy."""
    places = (p for p in inner.layers_by_module if p not in outer.record.copies)
    return next((p for p in places if is_within(p, outer.record.copies)), None)


def _require_originals(adapters: Adapters, name: str, call: str) -> None:
    if not adapters.merged[name]:
        raise RuntimeError(
            f"{call}: the adapter {name!r} was merged with keep_originals=False, so the base cannot be given back; "
            "load it anew"
        )


def _make_merged(model: Module, adapters: Adapters, names: Sequence[str], rounding: Rounding) -> None:
    """Makes the weights the originals as changed by these adapters in this order; changes all or nothing."""
    now = [n for n, kept in adapters.merged.items() if kept]
    moved = set(now) ^ set(names)
    places = dict.fromkeys(p for n in (*now, *names) if n in moved for p in adapters.trees[n].layers_by_module)
    new = dict(changed_weights(model, adapters, names, places, rounding))
    for key in [k for k in adapters.originals if k not in new and any(p in places for p in _above(k))]:
        _exchange(model, key, adapters.originals.pop(key))
    for key, value in new.items():
        before = _exchange(model, key, value)
        adapters.originals.setdefault(key, before)
    _wait_on_cpu(model, adapters)


def _exchange(model: Module, key: str, new: Tensor) -> Tensor:
    """Puts a parameter in place of another, which it gives back; what waited is moved and cast as the model was."""
    owner, _, attribute = key.rpartition(".")
    module = model.get_submodule(owner)
    held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    old: Tensor = held[attribute]
    if (new.device, new.dtype) != (old.device, old.dtype):
        move(new, old.device, old.dtype)
    held[attribute] = new
    take_place(module, old, new)
    return old


def _wait_on_cpu(model: Module, adapters: Adapters) -> None:
    cpu = torch.device("cpu")
    used = {id(t) for t in (*model.parameters(), *model.buffers())}
    for original in adapters.originals.values():
        if id(original) not in used and original.device != cpu:  # the other end of a tie goes on with it
            move(original, cpu, original.dtype)


def _above(key: str) -> list[str]:
    """The names of the modules that a parameter lies in, the root aside."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
