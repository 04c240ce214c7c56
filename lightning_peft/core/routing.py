"""Which adapters of a model are active: one value a model, replaced whole, read once a forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.core.rows import Rows

_PINS = "lightning_peft"
_numbers: dict[str, int] = {}
_next_number = itertools.count()


class Routing(NamedTuple):
    """What one forward runs with.

    Attributes:
        active: the adapters of all examples, innermost first.
        rows: the adapter of each example, instead, or None.
    """

    active: tuple[str, ...]
    rows: Rows | None = None

    def __str__(self) -> str:
        return f"adapters {list(self.active)}" if self.rows is None else f"adapters {list(self.rows.names)} by example"


class Switch:
    """The active adapters of one model; every adapted module of the model holds this object.

    Attributes:
        active: their names, innermost first.
        blocks: the names in each ``adapter_names`` block that some thread is in.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.blocks: list[tuple[str | None, ...]] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy that is made inside a block is not in it
        return {"active": self.active, "blocks": []}

    @property
    def routing(self) -> Routing:
        """What counts here and now: that with which this thread's forward began."""
        if torch.compiler.is_compiling():
            if self.blocks:
                raise RuntimeError("a compiled model takes no adapter_names: call the model as it was before compile()")
            return Routing(self.active)
        return _pins().get(id(self)) or Routing(self.active)

    @contextmanager
    def pinned(self, routing: Routing | None = None) -> Iterator[None]:
        """Holds what a forward runs with for this thread.

        Args:
            routing: what it runs with; None takes the active adapters unless something is held already.
        """
        before = _pins()
        if routing is None and id(self) in before:
            yield
            return
        torch._C._stash_obj_in_tls(_PINS, {**before, id(self): routing or Routing(self.active)})
        try:
            yield
        finally:
            torch._C._stash_obj_in_tls(_PINS, before)


def _pins() -> dict[int, Routing]:
    """What is held for this thread, by switch.

    It lies with torch's own thread-local state, which goes along to the threads that run a backward pass and with it
    the recomputations of activation checkpointing.
    """
    pins: dict[int, Routing] = torch._C._get_obj_in_tls(_PINS) if torch._C._is_key_in_tls(_PINS) else {}
    return pins


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
            routings = {number: routing for routing, number in _numbers.items()}
            raise RuntimeError(
                f"activation checkpointing recomputed a forward with the {routings[int(again)]} active, but it had "
                f"run with the {routings[ctx.number]}: the gradients would be wrong. Call backward() before you "
                "change the active adapters, and inside the adapter_names() block."
            )
        return grad, None


def bind(output: Any, routing: Routing) -> Any:
    """Ties an adapted module's output to the active set where a checkpoint may run the module again.

    Args:
        output: what the module gives: a tensor, or a tuple or list of which the first tensor is tied.
        routing: what this call runs with.

    Returns:
        The output, with the same values.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return output
    # Nothing outside such hooks ever recomputes a forward, so the usual case pays one look.
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return output
    key = str(routing)
    if key not in _numbers:
        _numbers[key] = next(_next_number)
    if isinstance(output, Tensor):
        return _Bound.apply(output, _numbers[key]) if output.requires_grad else output  # type: ignore[no-untyped-call]
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)([bind(output[0], routing), *output[1:]])
    return output
