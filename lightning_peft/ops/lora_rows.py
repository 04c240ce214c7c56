"""Low-rank changes of a linear layer's output of which each example has its own: ``y_i += s_i (x_i A_i^T) B_i^T``.

In place where that is allowed: nothing is gathered, put together or stacked, so that neither ranks nor scales have to
agree, and beside the output no more is held than the rank-sized product of one run of examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One low-rank change.

    Attributes:
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: the factor ``s`` on it.
    """

    a: Tensor
    b: Tensor
    scale: float


def add_by_row(y: Tensor, x: Tensor, runs: Sequence[tuple[int, Factors | None]], *, in_place: bool = False) -> Tensor:
    """Adds to each run of rows its own low-rank change.

    Args:
        y: ``(rows, ..., out)``.
        x: ``(rows, ..., in)``, read in y's dtype.
        runs: how many rows lie beside each other, and their change in y's dtype, None for no change.
        in_place: whether y may be written to: not where somebody else holds it. A forward that is differentiated
            writes into a new tensor all the same.

    Returns:
        ``(rows, ..., out)``.
    """
    counts, changes = zip(*runs, strict=True)
    tokens = math.prod(y.shape[1:-1])
    each = [count * tokens for count in counts]
    inputs = x.to(y.dtype).reshape(-1, x.shape[-1]).split_with_sizes(each)
    outputs = y.reshape(-1, y.shape[-1]).split_with_sizes(each)
    triples = [*zip(inputs, outputs, changes, strict=True)]
    kind = y.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if in_place and y.is_contiguous() and not torch.is_grad_enabled():
            for x_i, y_i, change in triples:
                if change is not None:
                    y_i.addmm_(x_i @ change.a.T, change.b.T, alpha=change.scale)
            return y
        parts = [y_i if change is None else _added(x_i, y_i, change) for x_i, y_i, change in triples]
        return torch.cat(parts).view(y.shape)


def _added(x: Tensor, y: Tensor, change: Factors) -> Tensor:
    return torch.addmm(y, x @ change.a.T, change.b.T, alpha=change.scale)
