"""What a training step computes, counted in multiplications and additions, and where it begins to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.core.matching import base_modules


@dataclass(frozen=True)
class StepCost:
    """The operations of a training step: those of matrix products, convolutions and attention, two a multiplication.

    Attributes:
        base: of the base's forward pass, without the adapter.
        forward: of the forward pass with it.
        backward: of the backward pass, which ends at the first place that trains.
        first: the module where that is: the first one, in the order in which they run, that gives what needs a
            gradient; ``""`` where only what stands between modules does.
        below: operations of the forward pass before that: nothing of them is kept, and the backward pass ends there.
    """

    base: int
    forward: int
    backward: int
    first: str
    below: int

    @property
    def of_full(self) -> float:
        """All of the step as a share of what training the whole base takes: three times its forward pass."""
        return (self.forward + self.backward) / (3 * self.base)

    @property
    def share_below(self) -> float:
        """The share of the forward pass that lies below what trains."""
        return self.below / self.forward


def counting() -> FlopCounterMode:
    """A block in which the operations of matrix products, convolutions and attention are counted."""
    import torch.nn.modules.linear_cross_entropy

    # operators that torch's list lacks
    known: dict[Any, Any] = {
        torch.ops.aten.addmm_: lambda into, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
        torch.ops.torch_nn._linear_cross_entropy_batch_chunked: _loss_in_chunks,
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        known[torch.ops.bitsandbytes.gemm_4bit] = lambda a, b, shape, *_, **__: 2 * math.prod(a[:-1]) * math.prod(shape)
    return FlopCounterMode(display=False, custom_mapping=known)


def _loss_in_chunks(hidden: Any, weight: Any, *options: Any, **_: Any) -> int:
    """A head's product and, with the loss, those of the gradients that it gives at once."""
    gradients = sum(map(bool, options[-3:-1]))
    return int(2 * math.prod(hidden) * weight[0] * (1 + gradients))


def cost_of_forward(model: Module, inputs: dict[str, Any]) -> int:
    """Counts the operations of a forward pass by running it.

    Args:
        model: a Hugging Face model; imitated ones cost no arithmetic.
        inputs: what it is called with.
    """
    with counting() as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def cost_of_step(model: Module, inputs: dict[str, Any], base: int) -> StepCost:
    """Counts a step by running it.

    Args:
        model: an adapted Hugging Face model; imitated ones cost no arithmetic. Gradients are left where they trained.
        inputs: what it is called with.
        base: what `cost_of_forward` gave for it before it was adapted.

    Returns:
        The counts.

    Raises:
        ValueError: if nothing that the model gives depends on what trains.
    """
    begun: dict[str, int] = {}
    found: list[str] = []
    with counting() as counter:

        def begin(name: str) -> None:
            begun.setdefault(name, counter.get_total_flops())

        def end(name: str, output: Any) -> None:
            if not found and any(t.requires_grad for t in _tensors(output)):
                found.append(name)

        handles = []
        for name, module in base_modules(model).items():
            if not module._modules:
                handles.append(module.register_forward_pre_hook(lambda *_, n=name: begin(n)))
                handles.append(module.register_forward_hook(lambda _, __, output, n=name: end(n, output)))
        try:
            outputs = model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        forward = counter.get_total_flops()
        trained = [t for t in _tensors(outputs) if t.requires_grad]
        if not trained:
            raise ValueError(f"nothing that {type(model).__name__} gives depends on what trains")
        torch.autograd.backward(trained[0].float().sum())
        whole = counter.get_total_flops()
    first = found[0] if found else ""
    return StepCost(base, forward, whole - forward, first, begun.get(first, forward))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [t for part in parts for t in _tensors(part)]


def operations(count: float) -> str:
    """A number of operations in the unit that keeps it short.

    Args:
        count: multiplications and additions.

    Returns:
        Such as ``"4.5 TFLOP"``.

    Example:
        >>> operations(4_455_359_578_112), operations(816)
        ('4.5 TFLOP', '816.0 FLOP')
    """
    shown, unit = float(count), "FLOP"
    for larger in ("kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"):
        if shown < 1000:
            break
        shown, unit = shown / 1000, larger
    return f"{shown:.1f} {unit}"
