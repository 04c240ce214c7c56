"""What a training step takes: the step itself is run, on tensors with numbers or without, and its memory counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.analysis.live_bytes import LiveBytes, storage_bytes
from lightning_peft.analysis.step_cost import counting
from lightning_peft.core.collector import paused_collector


@dataclass(frozen=True)
class StepMemory:
    """Bytes of live tensors in a training step that is not the first, and its operations.

    Attributes:
        weights: parameters and buffers that do not train.
        trained: parameters that do.
        gradients: of those; they lie there until the next step's forward pass has ended.
        optimizer: the optimizer's state.
        after_forward: all that is held when the loss is known.
        kept: of that, what the forward pass has left for the backward pass.
        peak: the most that is held at a time.
        logits: of the peak, what is as wide as the vocabulary, or the classes.
        operations: in matrix products, convolutions and attention, two a multiplication.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    after_forward: int
    kept: int
    peak: int
    logits: int
    operations: int


def memory_of_step(
    model: Module, optimizer: Callable[[], Optimizer], loss: Callable[[], Tensor], wide: int | None = None
) -> StepMemory:
    """Runs two steps as Lightning's automatic optimization does, and counts the second.

    Gradients of the last step are forgotten after the forward pass, as Lightning does it. Python's collector of garbage
    rests in the second step, so what only it would free counts.

    Args:
        model: what trains; it is changed as by any two steps.
        optimizer: makes the optimizer.
        loss: a forward pass.
        wide: the size of the last dimension of what counts as logits.

    Returns:
        The counts.
    """
    live = LiveBytes(wide)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    live.watch([*parameters, *model.buffers()])
    flops: FlopCounterMode = counting()
    chosen = optimizer()
    with live:
        with flops:  # which takes operators apart, and so what they keep
            _step(chosen, loss)
        gc.collect()  # what a checkpointed layer leaves refers to itself
        before = live.now
        live.restart()
        with paused_collector():
            after = _step(chosen, loss, lambda: live.now)
    of_trained = storage_bytes(trained)
    return StepMemory(
        weights=storage_bytes([*parameters, *model.buffers()]) - of_trained,
        trained=of_trained,
        gradients=storage_bytes(p.grad for p in trained if p.grad is not None),
        optimizer=storage_bytes(_tensors(chosen.state)),
        after_forward=after,
        kept=after - before,
        peak=live.peak,
        logits=live.last_at_peak,
        operations=int(flops.get_total_flops()),
    )


def _step(optimizer: Optimizer, loss: Callable[[], Tensor], look: Callable[[], int] = int) -> int:
    value = loss()
    found = look()
    optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return found


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor)]
