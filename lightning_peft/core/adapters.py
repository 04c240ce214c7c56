"""The adapters of one model by name, with what they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor
from torch.nn import Module, ModuleDict

from lightning_peft.core.problems import nearest
from lightning_peft.core.routing import Routing, Switch
from lightning_peft.core.tree import AdapterTree


class Adapters(ModuleDict):
    """Registered at the root of what is adapted, as ``adapters``.

    Attributes:
        switch: which of them are active.
        requires_grad_before: the base's flags before the first adapter froze it.
        merged: the merged adapters in the order of their merging, and whether their originals wait.
        originals: the waiting parameters by name.
        base_digests: of the base's parameters before anything trained, or as merged for good, for its fingerprint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch()
        self.requires_grad_before: dict[str, bool] = {}
        self.merged: dict[str, bool] = {}
        self.originals: dict[str, Tensor] = {}
        self.base_digests: dict[str, tuple[str, str | None]] = {}

    @property
    def trees(self) -> dict[str, AdapterTree]:
        """The adapters by name."""
        return {name: cast(AdapterTree, tree) for name, tree in self.items()}

    @property
    def in_place(self) -> set[str]:
        """Names of all base parameters that train in place, for any of the adapters."""
        return {name for tree in self.trees.values() for name in tree.record.in_place}


def adapters_of(model: Module) -> Adapters | None:
    """The model's adapters, or None if it is not the root of an adapted model."""
    found = model._modules.get("adapters")
    return found if isinstance(found, Adapters) else None


def routing_of(model: Module) -> Routing | None:
    """What a forward of the model would run with here and now, or None if it is not adapted.

    Args:
        model: the root.
    """
    adapters = adapters_of(model)
    return None if adapters is None else adapters.switch.routing


def require_adapters(model: Module, names: Iterable[str] = ()) -> Adapters:
    """The adapters of a model that has those of the given names.

    Args:
        model: the root.
        names: adapters that must be there.

    Raises:
        ValueError: if the model is not adapted, or has no adapter of one of the names.
    """
    adapters = adapters_of(model)
    if adapters is None:
        inside = [n for n, m in model.named_modules() if n and adapters_of(m) is not None]
        instead = f"its submodule {inside[0]!r} is, so pass that" if inside else "adapt() it first"
        raise ValueError(f"{type(model).__name__} is not adapted; {instead}")
    for name in names:
        if name not in adapters:
            raise ValueError(f"the model has no adapter {name!r}{nearest(name, adapters)}")
    return adapters


def refuse_in_use(adapters: Adapters, name: str) -> None:
    """Refuses to change an adapter that examples are running with.

    Args:
        adapters: the model's adapters.
        name: the adapter's name.

    Raises:
        RuntimeError: if some thread is in an ``adapter_names`` block that names it, or this one in a forward.
    """
    if adapters.switch.runs_here(name):
        raise RuntimeError(f"the adapter {name!r} is running in this thread; let the forward end first")
    if any(name in names for names in adapters.switch.blocks):
        raise RuntimeError(f"the adapter {name!r} is in use in an adapter_names() block; leave that first")


def tree_of(model: Module, name: str) -> AdapterTree:
    """One adapter of an adapted model.

    Args:
        model: the root.
        name: the adapter's name.

    Raises:
        KeyError: if there is none of that name.
    """
    adapters = adapters_of(model)
    if adapters is None or name not in adapters:
        raise KeyError(f"the model has no adapter {name!r}")
    return adapters.trees[name]
