"""The first layers of a stack that no training changes: which they are, what they give, and a forward without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapted import site_of
from lightning_peft.core.layer import AdapterLayer
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


def layers_around(layer: Module) -> list[AdapterLayer]:
    """The adapter layers around a layer of a stack.

    Args:
        layer: the layer.
    """
    site = site_of(layer)
    return [] if site is None else list(site.layers.values())


@contextmanager
def left_out(layers: Sequence[Module], states: Sequence[Tensor | None], in_tuples: Sequence[bool]) -> Iterator[None]:
    """Lets layers give what was computed before, or hand on what comes in, in this forward.

    Adapter layers around them run, with that as what their base gives.

    Args:
        layers: the first ones of a stack.
        states: what each of them would give, None where nobody reads it.
        in_tuples: for each whether it gives its output alone in a tuple.
    """
    with ExitStack() as forwards:
        for layer, given, in_tuple in zip(layers, states, in_tuples, strict=True):
            forwards.enter_context(_short(layer, given, in_tuple=in_tuple))
        yield


@contextmanager
def _short(layer: Module, given: Tensor | None, *, in_tuple: bool) -> Iterator[None]:
    """A layer's own forward computes nothing, but for other forwards than the one that it is for."""
    site = site_of(layer)
    base = site.base if site is not None and site.layers else None
    # what stands beside a layer may run it without a graph
    mine = this_forward(same_graph=base is None)
    own = layer.__dict__.get("forward") if base is None else base.instance_forward
    kind = type(layer) if base is None else base.cls

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not mine():
            return kind.forward(layer, *args, **kwargs) if own is None else own(*args, **kwargs)
        state = given if given is not None else args[0] if args else kwargs["hidden_states"]
        return (state,) if in_tuple else state

    if base is not None:
        base.instance_forward = forward
    else:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if base is not None:
            base.instance_forward = own
        elif own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = own
