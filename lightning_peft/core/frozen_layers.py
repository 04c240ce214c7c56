"""The first layers of a stack that no training changes: which they are, what they give, and a forward without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.per_forward import this_forward


class Watch:
    """What a forward's layers gave.

    Attributes:
        states: each layer's output, without its graph; None where that is not one tensor.
        in_tuples: whether it came alone in a tuple.
        frozen: how many of the first layers gave something that needs no gradient.
    """

    def __init__(self) -> None:
        self.states: list[Tensor | None] = []
        self.in_tuples: list[bool] = []
        self.frozen = 0

    def note(self, output: Any) -> None:
        """Takes the next layer's output."""
        in_tuple = isinstance(output, tuple) and len(output) == 1
        alone = output[0] if in_tuple else output
        state = alone if isinstance(alone, Tensor) else None
        if state is not None and not state.requires_grad and self.frozen == len(self.states):
            self.frozen += 1
        self.states.append(None if state is None else state.detach())
        self.in_tuples.append(in_tuple)


@contextmanager
def watching(layers: Sequence[Module]) -> Iterator[Watch]:
    """Notes what layers give in this forward.

    Args:
        layers: in the order in which they run.

    Yields:
        What is seen.
    """
    seen, mine = Watch(), this_forward()

    def note(_: Module, __: Any, output: Any) -> None:
        if mine():
            seen.note(output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        yield seen


@contextmanager
def left_out(layers: Sequence[Module], states: Tensor, in_tuples: Sequence[bool]) -> Iterator[None]:
    """Lets layers hand on what comes in, and the last of them give states that were computed before, in this forward.

    Args:
        layers: the first ones of a stack.
        states: what the last of them would give.
        in_tuples: for each whether it gives its output alone in a tuple.
    """
    before = [layer.__dict__.get("forward") for layer in layers]
    mine = this_forward()
    for layer, own, in_tuple in zip(layers, before, in_tuples, strict=True):
        given = states if layer is layers[-1] else None
        layer.__dict__["forward"] = _short(layer, own, given, mine, in_tuple=in_tuple)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _short(
    layer: Module, own: Callable[..., Any] | None, given: Tensor | None, mine: Callable[[], bool], *, in_tuple: bool
) -> Callable[..., Any]:
    """A forward that computes nothing, but for other forwards than the one that it is for."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not mine():
            return type(layer).forward(layer, *args, **kwargs) if own is None else own(*args, **kwargs)
        state = given if given is not None else args[0] if args else kwargs["hidden_states"]
        return (state,) if in_tuple else state

    return forward
