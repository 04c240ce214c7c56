"""How alike the directions of two low-rank changes are (LoRA, Hu et al., arXiv 2106.09685, 7.2).

A change ``B A`` maps the directions of its row space, in the input, to those of its column space, in the output. Both
are had from the factors, in float64; the full matrix is never made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Directions(NamedTuple):
    """A change taken apart, ``B A = U S V^T``, the largest singular value first.

    Attributes:
        columns: U, ``(out, k)``.
        values: S, ``(k,)``.
        rows: V, ``(in, k)``.
    """

    columns: Tensor
    values: Tensor
    rows: Tensor


@torch.no_grad()
def directions(a: Tensor, b: Tensor) -> Directions:
    """The singular vectors of ``B A``, of the small core between the QR decompositions of B and A.

    Args:
        a: ``(r, in)``.
        b: ``(out, r)``.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return Directions(left.Q @ u, s, right.Q @ vt.T)


@torch.no_grad()
def similarity(first: Tensor, second: Tensor) -> Tensor:
    """``phi(i, j) = |U_i^T V_j|_F^2 / min(i, j)`` of the first i and the first j directions, from 0 to 1.

    1 says that the smaller space lies in the larger one, 0 that they have nothing in common.

    Args:
        first: ``(n, k)``, orthonormal columns.
        second: ``(n, l)``, orthonormal columns.

    Returns:
        ``(k, l)``; row and column 0 are of the first direction alone.

    Example:
        >>> similarity(torch.eye(3)[:, :2], torch.eye(3)[:, [1, 2]])
        tensor([[0.0000, 0.0000],
                [1.0000, 0.5000]])
    """
    shared = (first.mT @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=shared.device) for n in shared.shape)
    return shared / torch.minimum(i[:, None], j[None])


@torch.no_grad()
def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """The angles between two subspaces in radians, the smallest first (Bjorck and Golub, 1973).

    Of small angles the cosine says little and the sine all, of large ones the other way round, so both are taken.

    Args:
        first: ``(n, k)``, orthonormal columns.
        second: ``(n, l)``, orthonormal columns.

    Returns:
        ``(min(k, l),)``.
    """
    inside = first.mT @ second
    cosines = torch.linalg.svdvals(inside)
    sines = torch.linalg.svdvals(second - first @ inside).flip(0)
    return torch.atan2(sines[: len(cosines)], cosines)
