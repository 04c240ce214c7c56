"""LightningModules that build their layers at every ``setup``: what was adapted is carried over, or its loss told."""

from __future__ import annotations

import torch
from torch.nn import Module

from lightning_peft.core.adapters import Adapters, adapters_of
from lightning_peft.handle import Adapter


def adapted_parts(root: Module, name: str) -> dict[str, Module]:
    """The modules that an adapter is about, the root under ``""``; empty if there is no such adapter.

    Args:
        root: the submodule that is adapted, or is to be.
        name: the adapter's name.
    """
    adapters = adapters_of(root)
    if adapters is None or name not in adapters:
        return {}
    tree = adapters.trees[name]
    places = [*tree.layers_by_module, *(n.rpartition(".")[0] for n in tree.record.in_place)]
    return {"": root} | {place: root.get_submodule(place) for place in places}


def refuse_rebuilt_parts(root: Module, parts: dict[str, Module]) -> None:
    """Refuses an adapted module in which something has been built anew, which the adapter does not reach.

    Args:
        root: the submodule that is adapted.
        parts: what `adapted_parts` gave before.

    Raises:
        RuntimeError: if one of them is another module now.
    """
    now = dict(root.named_modules())
    anew = [place for place, module in parts.items() if now.get(place) is not module]
    if anew:
        raise RuntimeError(_said(anew[0], "so the adapter that it had is gone"))


@torch.no_grad()
def carry_over(old: Module, new: Module, name: str) -> None:
    """Gives a root that was built and adapted anew what the adapter of the one before it had become.

    Args:
        old: the root before.
        new: the root that took its place.
        name: the adapter's name.

    Raises:
        RuntimeError: if the new root has other weights, or the old one has other adapters or is merged.
    """
    before, after = _adapters(old), _adapters(new)
    if before.base_digests != after.base_digests:
        raise RuntimeError(_said("", "with other weights than those that its adapter belongs to"))
    if len(before) > 1 or before.merged:
        raise RuntimeError(_said("", "and only one adapter that is not merged can be carried over"))
    was, now = Adapter(old, name), Adapter(new, name)
    now.tree.load_state_dict(was.tree.state_dict())
    trained = dict(old.named_parameters())
    for place in now.tree.record.in_place:
        new.get_parameter(place).copy_(trained[place])
    now.tree.record.prepared = was.tree.record.prepared
    now.tree.record.training = was.tree.record.training
    if was.tree.record.resting is not None:
        now.requires_grad_(False)


def _adapters(root: Module) -> Adapters:
    adapters = adapters_of(root)
    assert adapters is not None
    return adapters


def _said(place: str, why: str) -> str:
    what = repr(place) if place else "the adapted submodule"
    return (
        f"{what} has been built anew, {why}; build it once: in __init__, or where setup or configure_model first "
        "find that it is not there (if not hasattr(self, ...))"
    )
