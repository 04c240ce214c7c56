"""What differs between two adapters, by their files: method, options, base, tensors, and the changes that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_peft.analysis.spectrum import product_singular_values, rank_for
from lightning_peft.analysis.stored_factors import StoredFactors, no_factors, stored_factors
from lightning_peft.analysis.subspace import directions, principal_angles, similarity
from lightning_peft.core.method import Method
from lightning_peft.methods.lora import LoRA

_GRID = 16  # directions of which the similarity is kept


@dataclass(frozen=True)
class Subspaces:
    """How alike the directions of two changes are.

    Attributes:
        similarity: ``phi(i, j)`` of arXiv 2106.09685, 7.2, for the ranks that keep 99% of each change.
        grid: the same for the first i and j directions, to at most 16.
        angles: the principal angles between those spaces, in degrees, the smallest first.
    """

    similarity: float
    grid: list[list[float]]
    angles: list[float]


@dataclass(frozen=True)
class Difference:
    """How two changes of one weight, or two tensors of one name, differ.

    Attributes:
        name: the module's or the tensor's.
        norms: the Frobenius norm of either.
        difference: that of the first less the second.
        ranks: the smallest ranks that keep 99% of the squared norm of either; None of a tensor.
        columns: the directions in the output; None of a tensor, or where one of the changes is zero.
        rows: the directions in the input.
    """

    name: str
    norms: tuple[float, float]
    difference: float
    ranks: tuple[int, int] | None = None
    columns: Subspaces | None = None
    rows: Subspaces | None = None

    @property
    def relative(self) -> float:
        """The difference relative to both norms together: 0 for the same, 1 for unrelated ones, 1.41 for opposite."""
        both = math.hypot(*self.norms)
        return self.difference / both if both else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "relative": self.relative}


@dataclass(frozen=True)
class Differences:
    """What differs between two adapters.

    Attributes:
        options: the method and its options that differ, by name.
        base: what the files say of the base and differs.
        only: names of tensors that only the first, and only the second has.
        shapes: the shapes of tensors and changes of one name that differ in them.
        changes: of the modules that both change by factors.
        tensors: other tensors that both have.
        note: why the changes are not compared, or not whole; None where they are.
    """

    options: dict[str, tuple[Any, Any]]
    base: dict[str, tuple[Any, Any]]
    only: tuple[list[str], list[str]]
    shapes: dict[str, tuple[list[int], list[int]]]
    changes: list[Difference]
    tensors: list[Difference]
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``diff.json``."""
        return {
            "schema": 1,
            **{k: v for k, v in asdict(self).items() if k not in ("changes", "tensors")},
            "changes": {d.name: d.to_dict() for d in self.changes},
            "tensors": {d.name: d.to_dict() for d in self.tensors},
        }


@dataclass(frozen=True)
class Side:
    """One of the two adapters.

    Attributes:
        method: its method.
        base: what its files say of the base.
        tensors: by name, as of a file.
    """

    method: Method
    base: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def differences(a: Side, b: Side) -> Differences:
    """What differs between two adapters.

    Args:
        a: the first.
        b: the second.
    """
    options = [_options(side.method) for side in (a, b)]
    named = [{_plain(n): t for n, t in side.tensors.items()} for side in (a, b)]
    first, second = named
    shared = [n for n in first if n in second]
    shapes = {n: (list(first[n].shape), list(second[n].shape)) for n in shared if first[n].shape != second[n].shape}
    problem = no_factors(a.method) or no_factors(b.method)
    pairs = [{} if problem else {f.place: f for f in stored_factors(s.method, s.tensors)} for s in (a, b)]
    both = [(f, pairs[1][place]) for place, f in pairs[0].items() if place in pairs[1]]
    unlike = {f.place: (_shape(f), _shape(g)) for f, g in both if _shape(f) != _shape(g)}
    factors = {_plain(k) for of in pairs for f in of.values() for k in f.keys}
    alike = [n for n in shared if n not in shapes and n not in factors and first[n].is_floating_point()]
    return Differences(
        options=_differing(*options),
        # a fingerprint leaves out what trains, so it tells something of adapters that train the same alone
        base={
            k: v for k, v in _differing(a.base, b.base).items() if k != "fingerprint" or first.keys() == second.keys()
        },
        only=(sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())),
        shapes={**{n: pair for n, pair in shapes.items() if n not in factors}, **unlike},
        changes=[_of_changes(f, g) for f, g in both if f.place not in unlike],
        tensors=[_of_tensors(n, first[n], second[n]) for n in alike],
        note=f"Tensors are compared one by one: {problem}" if problem else _beside(a.method) or _beside(b.method),
    )


def _shape(factors: StoredFactors) -> list[int]:
    """Of the change that they make."""
    a, b = factors.product
    return [len(b), a.shape[1]]


def _options(method: Method) -> dict[str, Any]:
    return {"method": type(method).__name__, **asdict(cast(Any, method))}


def _beside(method: Method) -> str | None:
    """What is no product of factors in a LoRA's change."""
    if not isinstance(method, LoRA) or not (method.use_dora or method.lora_bias):
        return None
    what = "the lengths of the rows (use_dora)" if method.use_dora else "the biases beside B (lora_bias)"
    return f"The changes are B A alone; {what} are among the tensors"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def _plain(name: str) -> str:
    """A tensor's name without what a file of Hugging Face PEFT's puts around it, which checkpoints have not."""
    return re.sub(r"\.(lora_(?:A|B|magnitude_vector))\.weight$", r".\1", name.removeprefix("base_model.model."))


@torch.no_grad()
def _of_changes(first: StoredFactors, second: StoredFactors) -> Difference:
    (a, b), (c, d) = first.product, second.product
    values = [product_singular_values(*f.product) for f in (first, second)]
    norms = (float(values[0].norm()), float(values[1].norm()))
    gap = float(product_singular_values(torch.cat([a, c]), torch.cat([b, -d], 1)).norm())
    ranks = (rank_for(values[0]), rank_for(values[1]))
    if 0 in ranks:
        return Difference(first.place, norms, gap, ranks)
    one, other = directions(a, b), directions(c, d)
    return Difference(
        name=first.place,
        norms=norms,
        difference=gap,
        ranks=ranks,
        columns=_subspaces(one.columns, other.columns, ranks),
        rows=_subspaces(one.rows, other.rows, ranks),
    )


def _subspaces(first: Tensor, second: Tensor, ranks: tuple[int, int]) -> Subspaces:
    i, j = ranks
    grid = similarity(first[:, : max(i, _GRID)], second[:, : max(j, _GRID)])
    angles = principal_angles(first[:, :i], second[:, :j])
    return Subspaces(float(grid[i - 1, j - 1]), grid[:_GRID, :_GRID].tolist(), torch.rad2deg(angles).tolist())


def _of_tensors(name: str, first: Tensor, second: Tensor) -> Difference:
    one, other = first.double(), second.double()
    return Difference(name, (float(one.norm()), float(other.norm())), float((one - other).norm()))
