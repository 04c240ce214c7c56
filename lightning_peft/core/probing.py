"""Two ways through a model compared, with other values in its adapters: at its start an adapter may do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.mode import evaluating
from lightning_peft.core.per_forward import labels_of_batch

_SIZE = 0.5  # many times the usual deviation of a weight, so that nothing an adapter does is lost in rounding


@contextmanager
def probing(model: Module, size: float = _SIZE) -> Iterator[None]:
    """A model in evaluation mode, without a graph and autocast, whose adapters certainly act.

    What compares two ways through a model is to run in such a block; all is as before afterwards. Random numbers are
    drawn, and given back.

    Args:
        model: the root of what may be adapted.
        size: how large the numbers are that are added to the adapters'.
    """
    adapters = adapters_of(model)
    changed = [p for p in adapters.parameters() if p.is_floating_point()] if adapters is not None else []
    kept = [p.detach().clone() for p in changed]
    devices = sorted({p.device.index or 0 for p in changed if p.device.type == "cuda"})
    # what is tried has no labels, and those of the batch that waits are of other rows
    with torch.no_grad(), evaluating(model), labels_of_batch.passing(None), torch.autocast(_kind(model), enabled=False):
        with torch.random.fork_rng(devices):
            for p in changed:
                p.add_(torch.randn_like(p), alpha=size)
        try:
            yield
        finally:
            for p, value in zip(changed, kept, strict=True):
                p.copy_(value)


def _kind(model: Module) -> str:
    return next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")


def agree(found: Tensor, own: Tensor, exact: float | None = None) -> bool:
    """Whether logits are a model's own, but for what another order of the same sums makes of them.

    What all logits of a token share says nothing and does not count.

    Args:
        found: logits, ``(..., vocabulary)``.
        own: the model's.
        exact: how far they may be apart, as a share of the model's; None takes what their dtype can hold.
    """
    if found.shape != own.shape:
        return False
    one, other = (t.double() - t.double().mean(-1, keepdim=True) for t in (found, own))
    exact = exact or (1e-4 if found.dtype.itemsize >= 4 else 2e-2)
    return bool((one - other).norm() <= exact * other.norm())


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
