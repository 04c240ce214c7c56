"""How well values that were said follow those that were expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class Correlations(Metric):
    """Pearson's and Spearman's correlation, each the mean over the columns of ``(rows, values)``.

    Computed in float64 from all rows. `torchmetrics.PearsonCorrCoef` gives NaN for values with one far outlier, and
    `SpearmanCorrCoef` adds up ranks in 32 bits. A column that never changes has no correlation: then the value is NaN.
    """

    full_state_update: bool | None = False
    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    said: list[Tensor]
    expected: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("said", [], dist_reduce_fx="cat")
        self.add_state("expected", [], dist_reduce_fx="cat")

    @override
    def update(self, said: Tensor, expected: Tensor) -> None:
        """Adds a batch.

        Args:
            said: ``(rows, values)``.
            expected: ``(rows, values)``.
        """
        self.said.append(said)
        self.expected.append(expected)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``pearson`` and ``spearman``, scalars."""
        said, expected = (dim_zero_cat(v) for v in (self.said, self.expected))
        x, y = said.cpu().double(), expected.cpu().double()  # not every accelerator knows float64
        found = {"pearson": pearson(x, y).mean(), "spearman": pearson(ranks(x), ranks(y)).mean()}
        return {name: value.float().to(said.device) for name, value in found.items()}


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of each column: ``(rows, values)`` to ``(values,)``; NaN where one does not change."""
    moves = (x != x[:1]).any(0) & (y != y[:1]).any(0)
    x, y = x - x.mean(0), y - y.mean(0)
    found = (x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()
    return torch.where(moves, found.clamp(-1, 1), torch.nan)


def ranks(x: Tensor) -> Tensor:
    """The rank of each entry within its column, equal ones sharing their mean: ``(rows, values)``, float64."""
    columns = []
    for column in x.unbind(1):
        _, where, counts = column.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        columns.append((counts.cumsum(0) - (counts - 1) / 2)[where].double())
    return torch.stack(columns, 1)
