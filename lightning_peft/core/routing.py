"""Which adapters of a model are active: one value a model, replaced whole, read once a forward."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.core.rows import Rows, mapped

_PINS = "lightning_peft"
# what was bound lately, for errors; a long run with other rows in each batch must not fill the memory
_spoken: dict[int, str] = {}
_MOST_SPOKEN = 1000
_numbers = itertools.count()


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
        numbers: one for each adapter, which no other has, though it gets the name of one that was removed.
        changing: to be held by whoever looks at which adapters there are and then relies on it.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.blocks: list[tuple[str | None, ...]] = []
        self.numbers: dict[str, int] = {}
        self.changing = threading.Condition()
        self._running: dict[object, tuple[str, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a copy that is made inside a block or a forward is in none
        return {"active": self.active, "numbers": dict(self.numbers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def number(self, name: str) -> None:
        """Notes that an adapter was added.

        Args:
            name: the adapter's name.
        """
        self.numbers[name] = next(_numbers)

    def await_end(self, name: str) -> None:
        """Waits until no forward is under way that began with an adapter; to be called with `changing` held.

        Args:
            name: the adapter's name; no forward may begin with it any more.
        """
        self.changing.wait_for(lambda: not any(name in names for names in self._running.values()))

    def runs_here(self, name: str) -> bool:
        """Whether this thread is in a forward that began with an adapter.

        Args:
            name: the adapter's name.
        """
        pinned = _pins().get(id(self))
        return pinned is not None and name in pinned.active

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
        forward = object()
        if routing is None:
            with self.changing:
                routing = Routing(self.active)
                self._running[forward] = routing.active
        torch._C._stash_obj_in_tls(_PINS, {**before, id(self): routing})
        try:
            yield
        finally:
            torch._C._stash_obj_in_tls(_PINS, before)
            if forward in self._running:
                with self.changing:
                    del self._running[forward]
                    self.changing.notify_all()


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
            now, then = (_spoken.get(number, "other adapters") for number in (int(again), ctx.number))
            anew = ", of which one has been removed and another put in its place" if now == then else ""
            raise RuntimeError(
                f"activation checkpointing recomputed a forward with the {now} active, but it had run with the "
                f"{then}{anew}: the gradients would be wrong. Call backward() before you change the active adapters, "
                "and inside the adapter_names() block."
            )
        return grad, None


def bind(output: Any, routing: Routing, switch: Switch) -> Any:
    """Ties an adapted module's output to the active set where a checkpoint may run the module again.

    Args:
        output: what the module gives: a tensor, or tuples, lists and mappings of tensors.
        routing: what this call runs with.
        switch: the model's switch.

    Returns:
        The output, with the same values.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return output
    # Nothing outside such hooks ever recomputes a forward, so the usual case pays one look.
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return output
    names = routing.active if routing.rows is None else routing.rows.names
    number = hash((routing.active, names, *(switch.numbers.get(n) for n in names if n is not None)))
    if number not in _spoken:
        if len(_spoken) >= _MOST_SPOKEN:
            _spoken.clear()
        _spoken[number] = str(routing)

    def tied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        return _Bound.apply(leaf, number)  # type: ignore[no-untyped-call]

    return mapped(output, tied)
