"""Folding an adapter's change of weights into the base and taking it back, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapters import switch_of, tree_of
from lightning_peft.core.tree import AdapterTree


def merge(model: Module, name: str) -> None:
    """Adds an adapter's deltas to the weights; the adapter is inactive as long as it is merged.

    The sum is taken in float32 and cast once. Each merged weight is a new parameter in place of the original,
    which waits beside it: a weight tied to another module is untied, so the other end is not changed. Where the
    adapter changes both ends alike the tie stays.

    Args:
        model: the root.
        name: the adapter's name. Merging a merged adapter does nothing.

    Raises:
        ValueError: if the method cannot be merged, or a delta is not finite; nothing is changed then.
    """
    switch, tree = switch_of(model), tree_of(model, name)
    if tree.record.merged is not None:
        return
    if name not in switch.active:
        raise ValueError(f"the adapter {name!r} is not active; activate it before merging")
    deltas = _deltas(model, tree)
    merged: dict[tuple[str, str], tuple[Parameter, Parameter]] = {}
    for place, key in deltas:
        owner, attribute = _owner(model, place, key)
        original = owner._parameters[attribute]
        assert original is not None
        total = original.detach().float() + deltas[place, key].to(original.device)
        merged[place, key] = (original, _tied(merged, original, total.to(original.dtype)))
    tree.record.merged = merged
    _exchange(model, tree, 1)
    switch.active = tuple(n for n in switch.active if n != name)


def unmerge(model: Module, name: str) -> None:
    """Puts the original parameters back, the very same objects, and activates the adapter again.

    Args:
        model: the root.
        name: the adapter's name. Unmerging an unmerged adapter does nothing.
    """
    switch, tree = switch_of(model), tree_of(model, name)
    if tree.record.merged is not None:
        _exchange(model, tree, 0)
        tree.record.merged = None
        switch.active = (*switch.active, name)


def _tied(merged: dict[tuple[str, str], tuple[Parameter, Parameter]], original: Parameter, total: Tensor) -> Parameter:
    """The parameter that stands for the original: one that another module got for it, if that is the same."""
    known = (after for before, after in merged.values() if before is original and torch.equal(after, total))
    found = next(known, None)
    return Parameter(total, requires_grad=False) if found is None else found


def _exchange(model: Module, tree: AdapterTree, which: int) -> None:
    for (place, key), parameters in (tree.record.merged or {}).items():
        owner, attribute = _owner(model, place, key)
        owner._parameters[attribute] = parameters[which]


def _deltas(model: Module, tree: AdapterTree) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    method = type(tree.record.method).__name__
    for place, layer in tree.layers_by_module.items():
        with torch.no_grad():
            deltas = layer.deltas(model.get_submodule(place))
        if deltas is None:
            raise ValueError(
                f"{method} cannot be merged: its layer at {place or 'the whole model'!r} is no change of weights"
            )
        for key, delta in deltas.items():
            if not torch.isfinite(delta).all():
                raise ValueError(f"the adapter's change of {place}.{key} is not finite; the base is left as it is")
            found[place, key] = delta
    return found


def _owner(model: Module, place: str, key: str) -> tuple[Module, str]:
    inner, _, attribute = key.rpartition(".")
    return model.get_submodule(place).get_submodule(inner), attribute
