"""Which adapters of a model are active: one value a model, replaced whole, read once a forward."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_pins = threading.local()
_numbers: dict[tuple[str, ...], int] = {}
_next_number = itertools.count()


class Switch:
    """The active adapters of one model, innermost first; every adapted module of the model holds this object."""

    def __init__(self) -> None:
        self._active: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """The names that count here and now: those with which this thread's forward began."""
        if torch.compiler.is_compiling():
            return self._active
        pinned: dict[int, tuple[str, ...]] = getattr(_pins, "active", {})
        return pinned.get(id(self), self._active)

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self._active = names

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Holds the active set for this thread until the outermost forward ends."""
        pins: dict[int, tuple[str, ...]] = _pins.__dict__.setdefault("active", {})
        if id(self) in pins:
            yield
            return
        pins[id(self)] = self._active
        try:
            yield
        finally:
            del pins[id(self)]


class _Bound(torch.autograd.Function):
    """The identity, which in the backward pass compares the active set with the one of a recomputation.

    Under activation checkpointing saved tensors are made anew by a second forward, attributes of ``ctx`` are
    not: so the attribute tells the forward's active set and the saved tensor the recomputation's.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, number: int) -> Tensor:
        ctx.number = number
        ctx.save_for_backward(torch.tensor(number))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (again,) = ctx.saved_tensors
        if int(again) != ctx.number:
            names = {number: active for active, number in _numbers.items()}
            raise RuntimeError(
                f"activation checkpointing recomputed a forward with the adapters {list(names[int(again)])} "
                f"active, but it had run with {list(names[ctx.number])}: the gradients would be wrong. Call "
                "backward() before you change the active adapters."
            )
        return grad, None


def bind(output: Any, active: tuple[str, ...]) -> Any:
    """Ties an adapted module's output to the active set where a checkpoint may run the module again.

    Args:
        output: what the module gives: a tensor, or a tuple or list of which the first tensor is tied.
        active: the active set of this call.

    Returns:
        The output, with the same values.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return output
    # Nothing outside such hooks ever recomputes a forward, so the usual case pays one look.
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return output
    if active not in _numbers:
        _numbers[active] = next(_next_number)
    if isinstance(output, Tensor):
        return _Bound.apply(output, _numbers[active]) if output.requires_grad else output  # type: ignore[no-untyped-call]
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)([bind(output[0], active), *output[1:]])
    return output
