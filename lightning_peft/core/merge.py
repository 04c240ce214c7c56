"""Folding adapters' changes of weights into the base and taking them back, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapters import Adapters, refuse_in_use, require_adapters
from lightning_peft.core.fingerprint import renew_digests
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.inject import eject
from lightning_peft.core.layer import device_for
from lightning_peft.core.matching import base_modules, is_within
from lightning_peft.core.tree import AdapterTree
from lightning_peft.core.view import with_tensors


def merge(model: Module, name: str, *, keep_originals: bool = True) -> None:
    """Adds an adapter's deltas to the weights; the adapter is inactive as long as it is merged.

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
    if keep_originals:
        _make_merged(model, adapters, (*waiting, name))
    else:
        for _ in _changed(model, adapters, [name], adapters.trees[name].layers_by_module):
            pass  # whatever is refused is refused here, before the first original is gone
        changed = []
        for key, value in _changed(model, adapters, [name], adapters.trees[name].layers_by_module):
            _exchange(model, key, value)
            changed.append(key)
        renew_digests(adapters, base_parameters(model), changed)
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
    _make_merged(model, adapters, [n for n, kept in adapters.merged.items() if kept and n != name])
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
                held.setdefault(id(parameter), set()).add(_joined(place, key))
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


def _make_merged(model: Module, adapters: Adapters, names: Sequence[str]) -> None:
    """Makes the weights the originals as changed by these adapters in this order; changes all or nothing."""
    now = [n for n, kept in adapters.merged.items() if kept]
    moved = set(now) ^ set(names)
    places = dict.fromkeys(p for n in (*now, *names) if n in moved for p in adapters.trees[n].layers_by_module)
    new = dict(_changed(model, adapters, names, places))
    for key in [k for k in adapters.originals if k not in new and any(p in places for p in _above(k))]:
        _exchange(model, key, adapters.originals.pop(key))
    for key, value in new.items():
        before = _exchange(model, key, value)
        adapters.originals.setdefault(key, before)
    _wait_on_cpu(model, adapters)


def _changed(
    model: Module, adapters: Adapters, names: Sequence[str], places: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights at some places as these adapters change them, by name."""
    in_place = {id(model.get_parameter(n)) for n in adapters.in_place}
    made: dict[int, list[Parameter]] = {}
    for place in places:
        module = model.get_submodule(place)
        trees = [adapters.trees[n] for n in names if place in adapters.trees[n].layers_by_module]
        if not trees:
            continue
        now = dict(module.named_parameters(remove_duplicate=False)) if place else {}
        start = {k: cast(Parameter, adapters.originals.get(_joined(place, k), p)) for k, p in now.items()}
        for key, total in _sum(place, module, trees, now, start).items():
            if id(now[key]) in in_place:
                raise ValueError(f"{_joined(place, key)} trains in place, so nothing can be merged into it")
            value = total.to(now[key].dtype)
            if not torch.isfinite(value).all():
                raise ValueError(f"the merged {_joined(place, key)} is not finite; the base is left as it is")
            # where both ends of a tie change alike it stays one
            known = made.setdefault(id(start[key]), [])
            if not any(torch.equal(value, p) for p in known):
                known.append(_in_place_of(start[key], value))
            yield _joined(place, key), next(p for p in known if torch.equal(value, p))
        if place:
            statistics = dict(module.named_buffers())
            for key, value in {k: b for t in trees for k, b in t.layers_by_module[place].replaced().items()}.items():
                yield _joined(place, key), value.clone().to(statistics[key].dtype)


@torch.no_grad()
def _sum(
    place: str, module: Module, trees: Sequence[AdapterTree], now: dict[str, Parameter], start: dict[str, Parameter]
) -> dict[str, Tensor]:
    """The parameters of one module that change, in float32 or wider."""
    # one that cannot be read as it is, offloaded or quantized, goes through as it is and is refused if it changes
    weights = {k: _wide(p, now[k]) for k, p in start.items() if p.is_floating_point() and not now[k].is_meta}
    changed: dict[str, Tensor] = {}
    for tree in trees:
        # merged inside a training step, 16-bit precision would otherwise round the product of the factors
        with torch.autocast(device_for(module).type, enabled=False):
            deltas = tree.layers_by_module[place].deltas(with_tensors(module, weights))
        if deltas is None:
            method, where = tree.record.method, f" at {place!r}" if tree.record.method.mergeable else ""
            raise ValueError(
                f"{type(method).__name__}{where} is no change of weights, so it cannot be merged; export the adapter "
                "instead"
            )
        for key, delta in deltas.items():
            if key not in weights:
                raise ValueError(
                    f"{_joined(place, key)} cannot be merged into: it is offloaded, quantized or computed from other "
                    "parameters; load the model as it is, in memory, and merge there"
                )
            if not torch.isfinite(delta).all():
                raise ValueError(
                    f"the adapter's change of {_joined(place, key)} is not finite; the base is left as it is"
                )
            weights[key] = changed[key] = weights[key] + delta.to(weights[key].device)
    return changed


def _wide(original: Tensor, now: Tensor) -> Tensor:
    return original.detach().to(now.device, torch.promote_types(original.dtype, torch.float32))


def _in_place_of(original: Parameter, value: Tensor) -> Parameter:
    """A parameter with what was noted on the original, such as that it came from a checkpoint."""
    new = Parameter(value, requires_grad=False)
    new.__dict__.update(original.__dict__)
    return new


def _exchange(model: Module, key: str, new: Tensor) -> Tensor:
    """Puts a parameter in place of another, which it gives back; what waited is moved and cast as the model was."""
    owner, _, attribute = key.rpartition(".")
    module = model.get_submodule(owner)
    held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    old: Tensor = held[attribute]
    if (new.device, new.dtype) != (old.device, old.dtype):
        new.data = new.data.to(old.device, old.dtype)
    held[attribute] = new
    return old


def _wait_on_cpu(model: Module, adapters: Adapters) -> None:
    used = {id(t) for t in (*model.parameters(), *model.buffers())}
    for original in adapters.originals.values():
        if id(original) not in used:  # the other end of a tie goes on with it
            original.data = original.data.cpu()


def _above(key: str) -> list[str]:
    """The names of the modules that a parameter lies in, the root aside."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _joined(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
