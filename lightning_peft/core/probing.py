"""Two ways through a model compared, with other values in its adapters: at its start an adapter may do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.mode import evaluating
from lightning_peft.core.per_forward import labels_of_batch

_SIZE = 0.02  # the usual deviation of a language model's weights: seen in what it gives, and far from overflowing


@contextmanager
def probing(model: Module) -> Iterator[None]:
    """A model in evaluation mode, without a graph, whose adapters certainly act; all is as before afterwards.

    What compares two ways through a model is to run in such a block. Random numbers are drawn, and given back.

    Args:
        model: the root of what may be adapted.
    """
    adapters = adapters_of(model)
    changed = [p for p in adapters.parameters() if p.is_floating_point()] if adapters is not None else []
    kept = [p.detach().clone() for p in changed]
    devices = sorted({p.device.index or 0 for p in changed if p.device.type == "cuda"})
    # what is tried has no labels, and those of the batch that waits are of other rows
    with torch.no_grad(), evaluating(model), labels_of_batch.passing(None):
        with torch.random.fork_rng(devices):
            for p in changed:
                p.add_(torch.randn_like(p), alpha=_SIZE)
        try:
            yield
        finally:
            for p, value in zip(changed, kept, strict=True):
                p.copy_(value)


def agree(found: Tensor, own: Tensor) -> bool:
    """Whether logits are a model's own, but for what another order of the same sums makes of them.

    Args:
        found: logits.
        own: the model's.
    """
    if found.shape != own.shape:
        return False
    exact = 1e-4 if found.dtype.itemsize >= 4 else 2e-2
    return bool((found.double() - own.double()).norm() <= exact * own.double().norm())
