"""What the singular values of a change of a weight say: how large it is, and how many directions it needs.

A product ``B A`` of thin factors is decomposed by their QR decompositions and the small core between them; the full
matrix is never made. All is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY = 0.99
"""The share of the squared norm that counts as all of a change where a rank for it is named."""

_WIDE = 2**20  # numbers of a full matrix above which float32 has to do: a decomposition in float64 takes twice as long


@torch.no_grad()
def product_singular_values(a: Tensor, b: Tensor) -> Tensor:
    """The singular values of ``B A`` without making it, those of ``R_B R_A^T`` with ``B = Q_B R_B, A^T = Q_A R_A``.

    Args:
        a: ``(..., r, in)``.
        b: ``(..., out, r)``.

    Returns:
        ``(..., min(r, in, out))``, the largest first, in float64.

    Example:
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]])
        >>> product_singular_values(a, b)
        tensor([10.], dtype=torch.float64)
    """
    left = torch.linalg.qr(b.double(), mode="r").R
    right = torch.linalg.qr(a.double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


@torch.no_grad()
def matrix_singular_values(matrix: Tensor) -> Tensor:
    """The singular values of a full matrix, the largest first, in float64.

    Args:
        matrix: ``(..., out, in)``.
    """
    wide = matrix.shape[-2] * matrix.shape[-1] > _WIDE
    values: Tensor = torch.linalg.svdvals(matrix.float() if wide else matrix.double())
    return values.double()


def effective_rank(values: Tensor) -> float:
    """The entropy of the singular values as a number of directions, ``exp(-sum_i p_i log p_i)``, ``p_i = s_i / sum s``.

    Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007. ``n`` equal values give
    ``n``; it need not be whole.

    Args:
        values: the singular values, ``(n,)``.

    Returns:
        From 1 to n; 0 where all values are zero.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values.double() / total
    return round(float(torch.exp(torch.special.entr(shares).sum())), 12)


def rank_for(values: Tensor, energy: float = ENERGY) -> int:
    """The smallest rank whose best approximation keeps a share of the squared Frobenius norm.

    Args:
        values: the singular values, the largest first, ``(n,)``.
        energy: the share, above 0 and at most 1; 1 keeps all but what float64 rounds away.

    Returns:
        From 1 to n; 0 where all values are zero.

    Example:
        >>> rank_for(torch.tensor([10.0, 1.0, 0.1])), rank_for(torch.tensor([10.0, 1.0, 0.1]), 0.9999)
        (1, 2)
    """
    kept = values.double().square().cumsum(0)
    if not len(kept) or kept[-1] == 0:
        return 0
    noise = torch.finfo(torch.float64).eps * len(kept)
    return int((kept < kept[-1] * (energy - noise)).sum()) + 1


def kept_energy(values: Tensor, rank: int) -> float:
    """The share of the squared Frobenius norm that the best approximation of a rank keeps; 1 of nothing.

    Args:
        values: the singular values, the largest first.
        rank: the rank.
    """
    squares = values.double().square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0
