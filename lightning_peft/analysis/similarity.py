"""How alike two representations of the same examples are: linear CKA (Kornblith et al., arXiv 1905.00414, 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1024  # rows that exist in float64 at a time


@torch.no_grad()
def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Linear centered kernel alignment: ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` of centred features, Frobenius norms.

    1 where one is the other turned, scaled by one number or moved; 0 where no direction of one goes with any of the
    other. Sums are taken in float64, ``(p, q)`` at most: the memory does not grow with the examples. With fewer
    examples than features it is near 1 whatever they are.

    Args:
        X: features of examples, ``(n, p)``.
        Y: other features of the same examples, ``(n, q)``.

    Returns:
        0 to 1. Features that are the same for all examples are like each other, and like nothing else.

    Raises:
        ValueError: if the shapes are not those, or there are fewer than 2 examples.

    Example:
        >>> X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(X, 3 * X.flip(1) + 1), 6)
        1.0
    """
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or len(X) < 2:
        raise ValueError(
            f"linear_cka takes (n, p) and (n, q) of 2 examples or more, but got {tuple(X.shape)} and {tuple(Y.shape)}"
        )
    means = [features.mean(0, dtype=torch.float64) for features in (X, Y)]
    yx = X.new_zeros(Y.shape[1], X.shape[1], dtype=torch.float64)
    xx, yy = (yx.new_zeros(features.shape[1], features.shape[1]) for features in (X, Y))
    for x, y in zip(_centred(X, means[0]), _centred(Y, means[1]), strict=True):
        yx.addmm_(y.T, x)
        xx.addmm_(x.T, x)
        yy.addmm_(y.T, y)
    shared, own = _squares(yx), (_squares(xx), _squares(yy))
    if 0 in own:
        return float(own[0] == own[1])
    return shared / math.sqrt(own[0] * own[1])


def _centred(features: Tensor, mean: Tensor) -> Iterator[Tensor]:
    return (some.double() - mean for some in torch.split(features, _CHUNK))


def _squares(matrix: Tensor) -> float:
    return float(matrix.square().sum())
