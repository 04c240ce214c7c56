"""An adapter: one module that mirrors the names of the base's modules, with adapter layers as its leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.layer import AdapterLayer, moved_only
from lightning_peft.core.method import Method


@dataclass
class Record:
    """What is known of an adapter beside its tensors.

    Attributes:
        method: the recipe it was made by.
        layers: names of the modules that carry a layer of the method's own.
        copies: names of the modules that train as copies (``modules_to_save`` and new heads).
        new: names of the parameters that the base's checkpoint lacked.
        in_place: names of the base's parameters that train in place.
        originals: their starting values, or None where the method keeps none.
        resting: names of its parameters that trained until it was told not to; None while it trains.
        prepared: whether the data that the method asks for has been seen, here or before it was loaded.
        training: how it was trained, as those who train and save it note it; None where nobody did.
    """

    method: Method
    layers: list[str]
    copies: list[str]
    new: list[str]
    in_place: list[str]
    originals: dict[str, Tensor] | None
    resting: list[str] | None = None
    prepared: bool = False
    training: Any = None


class AdapterTree(Module):
    """One adapter, registered at the root of the model as ``adapters[name]``; its ``state_dict()`` is the adapter.

    Args:
        record: what is known of it.
        layers: the layers by the name of the module that they adapt.
    """

    def __init__(self, record: Record, layers: dict[str, AdapterLayer]) -> None:
        super().__init__()
        self.record = record
        self._layers = (layers,)  # a tuple, so that the dictionary's modules are not registered twice
        for name in sorted(layers, key=lambda n: n.count(".") if n else -1):
            _place(self, name, layers[name])

    @property
    def layers_by_module(self) -> dict[str, AdapterLayer]:
        """The layers by module name; the long name keeps clear of what the base's modules are called."""
        return self._layers[0]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and "" in self.layers_by_module:
            # The root's own layer is registered nowhere, and whoever puts a mode back sets this on each module
            self.layers_by_module[""].train(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTree:
        super()._apply(moved_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _place(tree: Module, name: str, layer: AdapterLayer) -> None:
    """Puts a layer where its module's name says.

    Names go into ``_modules`` as they are: ``add_module`` refuses those that a Module has as attributes, such as
    ``type`` or ``half``.
    """
    if not name:
        # The root's own layer has no name to stand under: its tensors belong at the top. The dictionaries are
        # shared, so that whatever moves or loads the tree reaches the layer.
        tree._parameters = layer._parameters
        tree._buffers = layer._buffers
        tree._non_persistent_buffers_set = layer._non_persistent_buffers_set
        return
    *parents, leaf = name.split(".")
    node: Module = tree
    for parent in parents:
        child = node._modules.get(parent)
        if child is None:
            child = Module()
            node._modules[parent] = child
        node = child
    if node._modules.get(leaf) is not None or leaf in node._parameters:
        raise ValueError(f"the adapter already has something at {name!r}; two layers cannot share a module's name")
    node._modules[leaf] = layer
