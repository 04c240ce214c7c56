"""A frozen linear layer and its low-rank change as one autograd function.

``y = x W^T + b + s (x A^T) B^T`` with ``W: (out, in)``, ``A: (r, in)``, ``B: (out, r)`` (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

calls = {"fused": 0, "plain": 0}
"""How many low-rank linears ran fused and plain since the start; losing the fast path shows here."""


def count(path: str) -> None:
    """Notes that a low-rank linear ran on this path; a compiled graph runs no such notes.

    Args:
        path: ``"fused"`` or ``"plain"``.
    """
    if not torch.compiler.is_compiling():
        calls[path] += 1


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same in plain PyTorch; the fused function is held to it.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: the factor ``s`` on the change.

    Returns:
        ``(..., out)``.
    """
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


class _LoRALinear(torch.autograd.Function):
    """Saves the input and the rank-sized product; adds the change into the output without a full-size temporary."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        h = rows @ a.T
        y.addmm_(h, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, h)
        ctx.scale = scale
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gb = g @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(gb, a, alpha=ctx.scale).view(ctx.shape)
        grad_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        grad_a = gb.T @ rows * ctx.scale if ctx.needs_input_grad[3] else None
        grad_b = g.T @ h * ctx.scale if ctx.needs_input_grad[4] else None
        return grad_x, None, grad_bias, grad_a, grad_b, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A frozen linear layer plus its low-rank change, fused.

    The tensors are cast to the compute dtype, autocast's or the input's, so that what is kept for the backward
    pass is never larger than the base would keep.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, frozen: it gets no gradient.
        bias: ``(out,)`` or None; it may train.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: the factor ``s`` on the change.

    Returns:
        ``(..., out)`` in the compute dtype.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _apply(x.to(dtype), weight, bias, a, b, scale)
    return _apply(x, weight, bias, a, b, scale)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = _LoRALinear.apply(x, weight.to(dtype), bias, a.to(dtype), b.to(dtype), scale)  # type: ignore[no-untyped-call]
    return out
