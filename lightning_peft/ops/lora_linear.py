"""A frozen linear layer and its low-rank change as one autograd function.

``y = x W^T + b + s (drop(x) A^T) B^T`` with ``W: (out, in)``, ``A: (r, in)``, ``B: (out, r)`` (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

calls = {"fused": 0, "beside": 0, "plain": 0, "by_row": 0}
"""How many low-rank linears ran fused with their base or beside it, plain, and for all adapters of a batch since the
start; losing a fast path shows here."""


def count(path: str) -> None:
    """Notes that a low-rank linear ran on this path; a compiled graph runs no such notes.

    Args:
        path: ``"fused"``, ``"beside"``, ``"plain"`` or ``"by_row"``.
    """
    if not torch.compiler.is_compiling():
        calls[path] += 1


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """The same in plain PyTorch; the fused function is held to it.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: the factor ``s`` on the change.
        p: the share of the change's inputs that is dropped.

    Returns:
        ``(..., out)``.
    """
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, p), a), b) * scale


class _LoRALinear(torch.autograd.Function):
    """Saves the input and the rank-sized product; adds the change into the output without a full-size temporary.

    What dropout left of the input is not saved: the backward pass draws the same mask again. Nor is an input that is
    itself a product of two tensors which are saved anyway: it is multiplied again. What somebody else has computed is
    given, and there is no weight then; without that too it is the change alone.

    Products of low rank are taken with the rank first, ``(r, tokens)``: with few columns instead, a CPU's take up to
    six times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: tuple[Tensor, Tensor] | None,
        given: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bias = None if bias is None else bias.to(x.dtype)
        ctx.generator = _generator_state(x.device) if p else None
        h = a @ (F.dropout(rows, p) if p else rows).T  # (r, tokens)
        if weight is not None:
            y = F.linear(rows, weight.to(x.dtype), bias)
            y.addmm_(h.T, b.T, alpha=scale)
        elif given is not None:
            y = torch.addmm(given.reshape(-1, given.shape[-1]), h.T, b.T, alpha=scale)
        else:
            y = (h.T @ b.T).mul_(scale)
        # only the gradient of A asks for the input
        read = (None, None) if not ctx.needs_input_grad[5] else factors or (x, None)
        # the weight as it is, to be cast again: its cast would be kept beside it for every layer
        ctx.save_for_backward(*read, weight, a, b, h)
        ctx.scale, ctx.p, ctx.shape = scale, p, x.shape
        # to what autograd knows as a view nobody could add in place
        whole: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, weight, a, b, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        bg = b.T @ g.T  # (r, tokens)
        mask = _mask_again(g.new_ones(len(g), ctx.shape[-1]), ctx.p, ctx.generator) if ctx.p else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                grad_x = (bg.T @ a).mul_(ctx.scale)
                grad_x = grad_x if mask is None else grad_x.mul_(mask)
            else:
                grad_x = g @ weight.to(g.dtype)
                if mask is None:
                    grad_x.addmm_(bg.T, a, alpha=ctx.scale)
                else:
                    grad_x.addcmul_(bg.T @ a, mask, value=ctx.scale)
            grad_x = grad_x.view(ctx.shape)
        grad_given = grad if ctx.needs_input_grad[2] else None
        grad_bias = g.sum(0) if ctx.needs_input_grad[4] else None
        grad_a = None
        if ctx.needs_input_grad[5]:
            rows = (left if right is None else left * right).reshape(-1, ctx.shape[-1])
            grad_a = bg @ (rows if mask is None else mask.mul_(rows)) * ctx.scale
        grad_b = (h @ g).T * ctx.scale if ctx.needs_input_grad[6] else None
        return grad_x, None, grad_given, None, grad_bias, grad_a, grad_b, None, None


def _factors(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What a tensor is the product of, such as an activation and a gate, if both are kept for the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a trace knows of no graph
        return None
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or x._version:  # what was changed in place is no product any more
        return None
    # hooks that pack saved tensors would be asked for them now, and a checkpoint run again
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    try:
        left, right = node._saved_self, node._saved_other  # type: ignore[attr-defined]
    except RuntimeError:  # the graph is used up
        return None
    if left is None or right is None or left.shape != x.shape or right.shape != x.shape:
        return None
    return (left.detach(), right.detach()) if left.dtype == right.dtype == x.dtype else None


def is_transformed() -> bool:
    """Whether a functional transform such as ``torch.func.vmap`` is at work, which takes plain operators alone."""
    return torch._C._are_functorch_transforms_active()


def can_draw_again(device: torch.device) -> bool:
    """Whether the backward pass can draw dropout's mask as the forward pass has drawn it.

    Args:
        device: of the input. A compiled graph can set no generator back; its compiler draws masks again by itself.
    """
    return device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def _generator_state(device: torch.device) -> Tensor:
    """Where the random numbers of a device stand; asking waits for nothing."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _mask_again(ones: Tensor, p: float, state: Tensor) -> Tensor:
    """The factors that dropout drew from there, ``0`` and ``1 / (1 - p)``; the generators stay as they are."""
    if ones.device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            return ones.bernoulli_(1 - p).div_(1 - p)  # what dropout does here, without its product
    with torch.random.fork_rng([ones.device]):
        torch.cuda.set_rng_state(state, ones.device)
        return F.dropout(ones, p)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
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
        p: the share of the change's inputs that is dropped, from 0 up to but not including 1; above 0 only where
            `can_draw_again`. What is drawn is what ``torch.nn.functional.dropout`` draws.

    Returns:
        ``(..., out)`` in the compute dtype.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _apply(_shared_cast(x, dtype), None, weight, bias, a, b, scale, p)
    return _apply(x, None, weight, bias, a, b, scale, p)


def lora_beside(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """A low-rank change added to what a layer gave that is none to be fused with, such as one with quantized weights.

    As much is kept for the backward pass as in `lora_linear`: the input, shared with other layers that read it.

    Args:
        y: ``(..., out)``, what the layer gave.
        x: ``(..., in)``, what it was given.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scale: the factor ``s`` on the change.
        p: the share of the change's inputs that is dropped, as in `lora_linear`.

    Returns:
        ``(..., out)`` in the dtype of ``y``.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            x = _shared_cast(x, dtype)
            if y.dtype == dtype:
                return _apply(x, y, None, None, a, b, scale, p)
            # in fewer bits what the layer gave would be rounded
            return y + _apply(x, None, None, None, a, b, scale, p)
    return _apply(_shared_cast(x, y.dtype), y, None, None, a, b, scale, p)


def _apply(
    x: Tensor,
    given: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
) -> Tensor:
    factors = a.to(x.dtype), b.to(x.dtype)
    out: Tensor = _LoRALinear.apply(x, _factors(x), given, weight, bias, *factors, scale, p)  # type: ignore[no-untyped-call]
    return out


_last_cast = threading.local()


def _shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in another dtype: one copy for all layers that read it one after the other, such as q, k and v.

    It lives as long as one of them keeps it for its backward pass. Autocast's own cache takes parameters alone.
    """
    if torch.compiler.is_compiling() or x.dtype == dtype or x.is_inference():
        return x.to(dtype)
    source, version, kept = _last_cast.__dict__.get("held", (_gone, 0, _gone))
    cast: Tensor | None = kept()
    tracked = x.requires_grad and torch.is_grad_enabled()
    if (
        source() is not x
        or version != x._version
        or cast is None
        or cast.dtype != dtype
        or cast.requires_grad != tracked
    ):
        cast = x.to(dtype)
        _last_cast.held = weakref.ref(x), x._version, weakref.ref(cast)
    return cast


def _gone() -> None:
    return None
