"""What a training step takes: the step itself is run, on tensors with numbers or without, and its memory counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_peft.analysis.live_bytes import LiveBytes, storage_bytes
from lightning_peft.analysis.step_cost import counting
from lightning_peft.core.collector import paused_collector
from lightning_peft.core.quantized import scales


@dataclass(frozen=True)
class StepMemory:
    """Bytes of live tensors in a training step that is not the first.

    Attributes:
        weights: parameters and buffers that do not train.
        trained: parameters that do.
        gradients: of those; they lie there until the next step's forward pass has ended.
        optimizer: the optimizer's state.
        after_forward: all that is held when the loss is known.
        kept: of that, what the forward pass has left for the backward pass.
        peak: the most that is held at a time.
        logits: of the peak, what is as wide as the vocabulary.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    after_forward: int
    kept: int
    peak: int
    logits: int


class CountedSteps:
    """Training steps as Lightning's automatic optimization makes them, counted.

    Gradients of the last step are forgotten after the forward pass, as Lightning does it.

    Args:
        model: what trains; it is changed as by any steps.
        optimizer: its optimizer.
        wide: the size of the last dimension of what counts as logits.
    """

    def __init__(self, model: Module, optimizer: Optimizer, wide: int | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.wide = wide

    def operations(self, loss: Callable[[], Tensor]) -> int:
        """Makes a step, and counts what it computes in products, convolutions and attention, two a multiplication.

        Args:
            loss: a forward pass.
        """
        with counting() as flops:  # which takes operators apart, and so what they keep
            self._step(loss)
        return int(flops.get_total_flops())

    def memory(self, loss: Callable[[], Tensor]) -> StepMemory:
        """Makes a step, after another one if it is the first, and counts its tensors.

        Python's collector of garbage rests in it, so what only it would free counts.

        Args:
            loss: a forward pass.
        """
        if not self.optimizer.state:
            self._step(loss)
        gc.collect()  # what a checkpointed layer leaves refers to itself
        live = LiveBytes(self.wide)
        parameters = list(self.model.parameters())
        tensors = [*parameters, *self.model.buffers(), *(t for p in parameters for t in scales(p))]
        trained = [p for p in parameters if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        states = [t for t in tree_leaves(dict(self.optimizer.state)) if isinstance(t, Tensor)]
        before = live.watch([*tensors, *gradients, *states])
        live.restart()
        del gradients
        with live, paused_collector():
            after = self._step(loss, lambda: live.now)
        of_trained = storage_bytes(trained)
        return StepMemory(
            weights=storage_bytes(tensors) - of_trained,
            trained=of_trained,
            gradients=storage_bytes(p.grad for p in trained if p.grad is not None),
            optimizer=storage_bytes(states),
            after_forward=after,
            kept=after - before,
            peak=live.peak,
            logits=live.last_at_peak,
        )

    def _step(self, loss: Callable[[], Tensor], look: Callable[[], int] = int) -> int:
        value = loss()
        found = look()
        self.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return found
