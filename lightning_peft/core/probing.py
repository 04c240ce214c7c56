"""Two ways through a model compared, with other values in its adapters: at its start an adapter may do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.mode import evaluating
from lightning_peft.core.per_forward import labels_of_batch
from lightning_peft.core.sharded import own_part, reshard

_SIZE = 0.5  # of what is added up in a product, so that nothing an adapter does is lost in rounding


@contextmanager
def probing(model: Module, size: float = _SIZE) -> Iterator[None]:
    """A model in evaluation mode, without a graph and autocast, whose adapters certainly act.

    What compares two ways through a model is to run in such a block; all is as before afterwards, random numbers
    included. Another thread that runs the model meanwhile sees the adapters changed, so it is for the time before the
    first step.

    Args:
        model: the root of what may be adapted.
        size: how large the sums of the numbers are that are added to the adapters'.
    """
    adapters = adapters_of(model)
    reshard(model)
    with torch.no_grad():
        # by .data: a graph that waits for its backward pass gets back the numbers that it was made with
        parameters = adapters.parameters() if adapters is not None else ()
        changed = [own_part(p.data) for p in parameters if p.is_floating_point()]
    kept = [p.clone() for p in changed]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        # what is tried has no labels, and those of the batch that waits are of other rows
        stack.enter_context(labels_of_batch.passing(None))
        stack.enter_context(_precision(model))
        with undrawn(model):
            for p in changed:
                p.add_(torch.randn_like(p), alpha=size / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1.0))
        try:
            yield
        finally:
            reshard(model)
            for p, value in zip(changed, kept, strict=True):
                p.copy_(value)


@contextmanager
def undrawn(model: Module) -> Iterator[None]:
    """Gives back the random numbers that are drawn in the block, on the CPU and on the GPUs that hold the model."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield


def _precision(model: Module) -> torch.autocast:
    """Autocast off, since it hides small differences; but flash attention knows no float32."""
    kind = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    whole = any(p.dtype == torch.float32 for p in model.parameters())
    return torch.autocast(kind, torch.bfloat16, enabled=flash and whole)


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to one number may be apart, as a share of it, in a model that computes in a dtype."""
    return 1e-4 if dtype.itemsize >= 4 else 2e-2


def agree(found: Tensor, own: Tensor, exact: float | None = None) -> bool:
    """Whether what a model says in two ways is the same, but for the order of the same sums.

    Args:
        found: what it says in one way.
        own: what it says by itself.
        exact: how far they may be apart, as a share of the model's own; None takes what their dtype can hold.
    """
    if found.shape != own.shape:
        return False
    exact = rounding(found.dtype) if exact is None else exact
    return bool((found.double() - own.double()).norm() <= exact * own.double().norm())


def states_of(model: Module) -> tuple[Any, ...]:
    """What tells the adapters with which a model would run now from any others, of the same name too.

    Args:
        model: the root of what may be adapted.
    """
    adapters = adapters_of(model)
    if adapters is None:
        return ()
    routing = adapters.switch.routing
    return (routing, *(weakref.ref(adapters.trees[name]) for name in routing.active))
