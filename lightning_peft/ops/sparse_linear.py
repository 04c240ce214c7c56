"""A linear map with few entries that are not zero, as one autograd function.

``y = x D^T`` with ``D: (out, in)``, which is ``values: (n,)`` at the places ``indices: (2, n)`` (row, column) and zero
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def dense(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The whole matrix.

    Args:
        values: ``(n,)``.
        indices: ``(2, n)``, whole numbers: rows and columns, each pair once.
        shape: ``(out, in)``.

    Returns:
        ``D``, in the dtype of the values.
    """
    rows, columns = indices.long()
    flat = values.new_zeros(shape[0] * shape[1])
    return flat.index_copy(0, rows * shape[1] + columns, values).view(shape)


def sparse_linear_reference(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same in plain PyTorch; the function is held to it.

    Args:
        x: ``(..., in)``.
        values: ``(n,)``.
        indices: ``(2, n)``.
        shape: ``(out, in)``.

    Returns:
        ``(..., out)``.
    """
    return F.linear(x, dense(values, indices, shape))


class _SparseLinear(torch.autograd.Function):
    """Keeps the values and builds the matrix anew for the backward pass: kept, it would be a second base in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.shape = shape
        return F.linear(x, dense(values, indices, shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        grad_x = grad @ dense(values, indices, ctx.shape) if ctx.needs_input_grad[0] else None
        grad_values = None
        if ctx.needs_input_grad[1]:
            rows, columns = indices.long()
            whole = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            grad_values = whole[rows, columns]
        return grad_x, grad_values, None, None


def sparse_linear(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """A linear map whose matrix is zero but in the chosen places.

    Args:
        x: ``(..., in)``; its dtype is that of the computation, under autocast too.
        values: ``(n,)``, cast to it.
        indices: ``(2, n)``.
        shape: ``(out, in)``.

    Returns:
        ``(..., out)``.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _apply(x, values, indices, shape)
    return _apply(x, values, indices, shape)


def _apply(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    out: Tensor = _SparseLinear.apply(x, values.to(x.dtype), indices, shape)  # type: ignore[no-untyped-call]
    return out
