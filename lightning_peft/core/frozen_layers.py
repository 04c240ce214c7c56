"""The first layers of a stack that no training changes: which they are, what they give, and a forward without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module


class Watch:
    """What a forward's layers gave.

    Attributes:
        states: each layer's output, without its graph; None where that is not one tensor.
        frozen: how many of the first layers gave something that needs no gradient.
    """

    def __init__(self) -> None:
        self.states: list[Tensor | None] = []
        self.frozen = 0

    def note(self, output: Any) -> None:
        """Takes the next layer's output."""
        alone = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        state = alone if isinstance(alone, Tensor) else None
        if state is not None and not state.requires_grad and self.frozen == len(self.states):
            self.frozen += 1
        self.states.append(None if state is None else state.detach())


@contextmanager
def watching(layers: Sequence[Module]) -> Iterator[Watch]:
    """Notes what layers give in one forward.

    Args:
        layers: in the order in which they run.

    Yields:
        What is seen.
    """
    seen = Watch()
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda _, __, output: seen.note(output)).remove)
        yield seen


@contextmanager
def left_out(layers: Sequence[Module], states: Tensor) -> Iterator[None]:
    """Lets layers hand on what comes in, and the last of them give states that were computed before.

    Args:
        layers: the first ones of a stack.
        states: what the last of them would give.
    """
    before = [layer.__dict__.get("forward") for layer in layers]

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def give(*_: Any, **__: Any) -> Tensor:
        return states

    for layer in layers:
        layer.__dict__["forward"] = give if layer is layers[-1] else hand_on
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward
