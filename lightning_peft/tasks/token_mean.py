"""The mean loss over an optimizer step whose micro-batches and ranks hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter


class TokenMean:
    """Divides summed losses by the number of units of the whole step, known only when its last batch has come.

    Every batch's sum is divided by one reference count, that of the step's first batch (its mean over ranks), so
    gradients have their usual size while they gather; what the reference was off by is mended just before the
    optimizer steps.

    Args:
        reference: what an unfinished step is divided by; None is none.
        count: the units of its batches so far.
    """

    def __init__(self, reference: Tensor | None = None, count: Tensor | None = None) -> None:
        self._reference = reference
        self._count = count

    @property
    def counted(self) -> tuple[Tensor | None, Tensor | None]:
        """Both of an unfinished step, to go on from."""
        return self._reference, self._count

    def scaled(self, total: Tensor, count: Tensor) -> Tensor:
        """The loss to run backward on.

        Args:
            total: sum of the losses of the batch's units.
            count: how many units.

        Returns:
            A scalar.
        """
        count = count.detach().float()
        if self._reference is None or self._count is None:
            self._reference = _over_ranks(count.clone()).clamp_min(1) / _ranks()
            self._count = torch.zeros_like(count)
        self._count = self._count + count
        return total / self._reference

    def normalise(self, parameters: Iterable[Parameter], accumulated: int) -> None:
        """Turns the gathered gradients into those of the mean over all units of the step.

        Args:
            parameters: those that may have gradients.
            accumulated: by how many Lightning divided each batch's loss.
        """
        if self._reference is None or self._count is None:
            return
        total = _over_ranks(self._count).clamp_min(1)
        factor = self._reference * accumulated * _ranks() / total
        self._reference = self._count = None
        if factor == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_ranks(value: Tensor) -> Tensor:
    if _ranks() > 1:
        dist.all_reduce(value)
    return value
