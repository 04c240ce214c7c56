"""How low-rank changes ``D_i = s_i B_i A_i`` become one: the mathematics of combining LoRA adapters.

Exact: the weighted sum ``D = sum_i w_i D_i`` as factors one beside the other (``cat``), its best approximation of
a lower rank (``svd``). Sparse: TIES (Yadav et al., arXiv 2306.01708, 3) and DARE (Yu et al., arXiv 2311.03099, 3.1),
on the changes themselves (names in ``_svd``) or, cheaper and rougher, on the factors A and B each by itself.
Deviation: TIES trims each weight's change by itself, not all of the model's as one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""``A: (r, in)`` and ``B: (out, r)``."""


class Combination(NamedTuple):
    """One way to combine.

    Attributes:
        sparsify: what is done to each change before: nothing, `trimmed` or `dropped`.
        join: how the changes become one: `weighted_sum` or `elected_mean`.
        of_products: whether ``B A`` is combined and then factored, else A and B each by itself.
        exact: whether the factors are put side by side instead.
    """

    sparsify: Callable[[Tensor, float, torch.Generator], Tensor] | None
    join: Callable[[Tensor, Tensor], Tensor]
    of_products: bool = False
    exact: bool = False


def weighted_sum(changes: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i D_i``; ``(n, ...)`` and ``(n,)`` -> ``(...)``."""
    total: Tensor = torch.tensordot(weights, changes, dims=1)
    return total


def elected_mean(changes: Tensor, weights: Tensor) -> Tensor:
    """TIES after its trimming: for each value the mean of those ``w_i D_i`` whose sign is that of ``sum_i D_i``.

    Args:
        changes: ``(n, ...)``.
        weights: ``(n,)``; one common value is the paper's ``lambda``. They have no vote on the sign.
    """
    elected = changes.sum(0).sign()
    agrees = (changes.sign() == elected) & (elected != 0)
    return weighted_sum(changes * agrees, weights) / agrees.sum(0).clamp_min(1)


def trimmed(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The share ``density`` of largest magnitude, the rest zero; nothing is drawn."""
    flat = change.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each value is kept with probability ``density`` and then divided by it, so that the mean stays.

    Args:
        change: any shape.
        density: one minus the paper's drop rate ``p``.
        generator: on the CPU, so that every machine drops the same.
    """
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return change * kept.to(change.device) / density


COMBINATIONS: dict[str, Combination] = {
    "cat": Combination(None, weighted_sum, exact=True),
    "svd": Combination(None, weighted_sum, of_products=True),
    "linear": Combination(None, weighted_sum),
}
for _name, _sparsify, _join in (
    ("ties", trimmed, elected_mean),
    ("dare_linear", dropped, weighted_sum),
    ("dare_ties", dropped, elected_mean),
    ("magnitude_prune", trimmed, weighted_sum),
):
    COMBINATIONS[_name] = Combination(_sparsify, _join)
    COMBINATIONS[f"{_name}_svd"] = Combination(_sparsify, _join, of_products=True)


def combined(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    how: Combination,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """One change out of several of the same shape, as it is, without any factors.

    Args:
        changes: the changes.
        weights: one each.
        how: the way.
        density: what share the way keeps, where it keeps a share.
        generator: for what is drawn.
    """
    sparsify = how.sparsify
    sparse = [c.double() if sparsify is None else sparsify(c.double(), density, generator) for c in changes]
    return how.join(torch.stack(sparse), torch.tensor(weights, dtype=torch.float64, device=sparse[0].device))


def combined_factors(
    factors: Sequence[Factors],
    scales: Sequence[float],
    weights: Sequence[float],
    how: Combination,
    rank: int | None,
    density: float,
    generator: torch.Generator,
) -> Factors:
    """The factors of one change out of those of several, in float64.

    Args:
        factors: of the changes without their scales.
        scales: the ``s_i``, which are part of the changes: they have a vote on a sign.
        weights: the ``w_i``.
        how: the way.
        rank: of the result for ways of products; None takes the highest of the given.
        density: what share the way keeps, where it keeps a share.
        generator: for what is drawn.

    Returns:
        Factors with ``B A`` the result, so their scale is 1.

    Raises:
        ValueError: if factors of different rank are to be combined each by itself.
    """
    pairs = [(a.double(), b.double()) for a, b in factors]
    ranks = [len(a) for a, _ in pairs]
    strengths = [w * s for w, s in zip(weights, scales, strict=True)]
    limit = min(len(pairs[0][1]), pairs[0][0].shape[1])
    if how.exact:
        whole = _side_by_side(pairs, strengths)
        # A sum of more ranks than the weight has is exactly what as many factors as it has ranks can hold
        return whole if sum(ranks) <= limit else best_factors(*whole, limit)
    if how.of_products:
        wanted = rank or min(max(ranks), limit)
        if how.sparsify is None:
            return best_factors(*_side_by_side(pairs, strengths), wanted)
        products = [s * b @ a for s, (a, b) in zip(scales, pairs, strict=True)]
        return factored(combined(products, weights, how, density, generator), wanted)
    if len(set(ranks)) > 1:
        raise ValueError(f"the ranks differ ({', '.join(map(str, ranks))})")
    roots = [math.sqrt(abs(c)) for c in strengths]
    signed = [math.copysign(root, c) for root, c in zip(roots, strengths, strict=True)]
    a = combined([a for a, _ in pairs], signed, how, density, generator)
    return a, combined([b for _, b in pairs], roots, how, density, generator)


def factored(product: Tensor, rank: int) -> Factors:
    """The factors of the nearest matrix of a rank (Eckart and Young), each with half of its strength.

    Args:
        product: ``(out, in)``.
        rank: of the result; what goes beyond the matrix's own is zero.
    """
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    n = min(rank, len(s))
    root = s[:n].sqrt()
    a, b = product.new_zeros(rank, product.shape[1]), product.new_zeros(len(product), rank)
    a[:n] = root[:, None] * v[:n]
    b[:, :n] = u[:, :n] * root
    return a, b


def best_factors(a: Tensor, b: Tensor, rank: int) -> Factors:
    """`factored` of ``B A`` without making it: of the small core between the QR decompositions of B and A.

    Args:
        a: ``(k, in)``.
        b: ``(out, k)``.
        rank: of the result.
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
    core_a, core_b = factored(left.R @ right.R.T, rank)
    return core_a @ right.Q.T, left.Q @ core_b


def _side_by_side(pairs: Sequence[Factors], strengths: Sequence[float]) -> Factors:
    return torch.cat([a for a, _ in pairs]), torch.cat([c * b for (_, b), c in zip(pairs, strengths, strict=True)], 1)
