"""What an adapter changes of each weight: norms, singular values, and the rank that would do.

From the layers of an adapted model; what a LoRA's file says without its base is in `stored_factors`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd

from lightning_peft.analysis.spectrum import (
    effective_rank,
    matrix_singular_values,
    product_singular_values,
    rank_for,
)
from lightning_peft.core.adapters import require_adapters
from lightning_peft.core.changed_weights import joined
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.quantized import is_quantized, numbers
from lightning_peft.core.view import with_tensors

_SHOWN = 64
"""Singular values that are kept of each change; those of a full matrix are thousands."""


@dataclass(frozen=True)
class Change:
    """What is known of one changed weight, or of one matrix of a method that changes none.

    Attributes:
        name: the parameter's, without ``.weight``; of a stack of matrices with its number, ``experts.down_proj[3]``.
        shape: of the change.
        capacity: the rank that there is room for: r of a LoRA, the smaller side of the matrix else.
        norm: the Frobenius norm of the change.
        weight_norm: that of the weight; None where there is none, or no base.
        values: the largest singular values of the change; none of a vector.
        effective_rank: `effective_rank` of all of them.
        rank: the smallest rank that keeps 99% of the squared norm.
        factored: whether the method's own factors bound the rank.
    """

    name: str
    shape: tuple[int, ...]
    capacity: int
    norm: float
    weight_norm: float | None
    values: tuple[float, ...]
    effective_rank: float
    rank: int
    factored: bool = False

    @property
    def relative(self) -> float | None:
        """The norm of the change relative to the weight's."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def layer(self) -> str:
        """The name of the layer: up to the first number; ``""`` outside of layers."""
        found = re.match(r"((?:.*?\.)?\d+)\.", self.name)
        return found.group(1) if found else ""

    @property
    def kind(self) -> str:
        """The name within the layer, which modules of one kind share."""
        return self.name[len(self.layer) + 1 :] if self.layer else self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shape": list(self.shape),
            "capacity": self.capacity,
            "norm": self.norm,
            "weight_norm": self.weight_norm,
            "relative": self.relative,
            "effective_rank": self.effective_rank,
            "rank": self.rank,
            "unused": self.capacity - self.rank if self.factored else None,
            "singular_values": list(self.values),
        }


@torch.no_grad()
def changes_of(model: Module, name: str = "default") -> list[Change]:
    """The changes that an adapter makes to the base's weights, in the order of the model.

    Products of thin factors are decomposed by these; other changes as full matrices. Weights that train in place
    count by what they differ from their kept starting values. What the base's files lack, such as a new head, has no
    start that it could be compared with, and is left out.

    Args:
        model: the adapted model; nothing in it is changed.
        name: the adapter's name.

    Raises:
        ValueError: if the model has no such adapter, or the adapter is merged.
    """
    adapters = require_adapters(model, [name])
    if name in adapters.merged:
        raise ValueError(f"the adapter {name!r} is merged; unmerge() it first")
    record = adapters.trees[name].record
    found: list[Change] = []
    for place, layer in adapters.trees[name].layers_by_module.items():
        found += _changes_at(place, layer, model.get_submodule(place), record.new)
    for key, original in (record.originals or {}).items():
        parameter = dict(model.named_parameters()).get(key)
        if parameter is not None and parameter.is_floating_point() and key not in record.new:
            start = original.to(parameter.device).float()
            owner = model.get_submodule(key.rpartition(".")[0])
            found += _changes_in(_called(key), owner, parameter.detach().float() - start, start)
    return found


@torch.no_grad()
def own_matrices(model: Module, name: str = "default") -> list[Change]:
    """The matrices of the layers that change no weight, such as prompts and bottlenecks, each as if it were a change.

    Args:
        model: the adapted model.
        name: the adapter's name.
    """
    layers = require_adapters(model, [name]).trees[name].layers_by_module
    found: list[Change] = []
    for place, layer in layers.items():
        if _deltas(place, layer, model.get_submodule(place)) is None:
            for key, parameter in layer.named_parameters():
                if parameter.dim() > 1 and parameter.is_floating_point():
                    found += _changes_in(joined(place, key), layer, parameter.detach(), None)
    return found


def _changes_at(place: str, layer: AdapterLayer, module: Module, new: Container[str]) -> Iterator[Change]:
    products = layer.products()
    if products is None:
        for key, delta in (_deltas(place, layer, module) or {}).items():
            if joined(place, key) in new:
                continue
            yield from _changes_in(_called(joined(place, key)), module, delta, _weight(module, key))
        return
    for key, (a, b) in products.items():
        weight = _weight(module, key)
        if a.dim() == 2:
            yield product_change(_called(joined(place, key)), a, b, None if weight is None else float(weight.norm()))
            continue
        norms = [None] * len(a) if weight is None else [float(w.norm()) for w in weight]
        for i, norm in enumerate(norms):
            yield product_change(f"{_called(joined(place, key))}[{i}]", a[i], b[i], norm)


def _deltas(place: str, layer: AdapterLayer, module: Module) -> dict[str, Tensor] | None:
    """The full changes of a layer, as merging would add them; None of one that changes no weight."""
    named = module.named_parameters(remove_duplicate=False) if place else ()
    wide = {k: w for k, _ in named if (w := _weight(module, k)) is not None}
    return layer.deltas(with_tensors(module, wide))


def _weight(module: Module, key: str) -> Tensor | None:
    """The numbers of a module's parameter; None where they cannot be read here."""
    weight = module.get_parameter(key)
    readable = is_quantized(weight) or (weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta)
    return numbers(module.get_submodule(key.rpartition(".")[0]), weight) if readable else None


def _changes_in(name: str, owner: Module, delta: Tensor, weight: Tensor | None) -> Iterator[Change]:
    """The changes in one parameter: one, or of a stack one for each matrix."""
    if delta.dim() > 2 and isinstance(owner, _ConvNd):
        delta, weight = delta.flatten(1), None if weight is None else weight.flatten(1)
    if delta.dim() <= 2:
        yield _full_change(name, delta, weight)
        return
    rows, whole = delta.flatten(0, -3), None if weight is None else weight.reshape(-1, *delta.shape[-2:])
    for i, matrix in enumerate(rows):
        yield _full_change(f"{name}[{i}]" if len(rows) > 1 else name, matrix, None if whole is None else whole[i])


def _full_change(name: str, delta: Tensor, weight: Tensor | None) -> Change:
    norm = None if weight is None else float(weight.double().norm())
    if delta.dim() < 2:
        size = float(delta.double().norm())
        return Change(name, tuple(delta.shape), 1, size, norm, (), float(size > 0), int(size > 0))
    return _change(name, tuple(delta.shape), min(delta.shape), matrix_singular_values(delta), norm, factored=False)


def matrices_of(name: str, tensor: Tensor) -> list[Change]:
    """A tensor by itself as if it were a change: its norm, and its singular values where it is a matrix or a stack.

    Args:
        name: what it is called.
        tensor: of any shape.
    """
    return list(_changes_in(name, Module(), tensor, None))


def product_change(name: str, a: Tensor, b: Tensor, weight_norm: float | None = None) -> Change:
    """What is known of a change ``B A``.

    Args:
        name: what it is called.
        a: ``(r, in)``.
        b: ``(out, r)``, with the strength.
        weight_norm: the Frobenius norm of the weight.
    """
    values = product_singular_values(a, b)
    return _change(name, (len(b), a.shape[1]), len(a), values, weight_norm, factored=True)


def _change(
    name: str, shape: tuple[int, ...], capacity: int, values: Tensor, weight_norm: float | None, *, factored: bool
) -> Change:
    return Change(
        name=name,
        shape=shape,
        capacity=capacity,
        norm=float(values.norm()),
        weight_norm=weight_norm,
        values=tuple(values[:_SHOWN].tolist()),
        effective_rank=effective_rank(values),
        rank=rank_for(values),
        factored=factored,
    )


def _called(name: str) -> str:
    return name.removesuffix(".weight")
