"""Rows with one number each, or several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_peft.tasks.class_names import readable
from lightning_peft.tasks.correlations import Correlations


class Regression:
    """A number a row, or a list of as many as every row has; the loss is the squared error.

    Args:
        known: how many numbers.
        by_number: of no meaning here.
    """

    option: ClassVar[str] = "num_labels"
    # the error is defined for every model and data; a correlation is not, and does not see a wrong scale
    monitor: ClassVar[str] = "val/mse"
    mode: ClassVar[str] = "min"

    def __init__(self, known: int, *, by_number: bool) -> None:
        self.count = known

    @classmethod
    def learn(cls, labels: Iterable[Any]) -> int:
        """How many numbers most training rows have."""
        return Counter(len(row) for row in readable(labels, _numbers)).most_common(1)[0][0]

    @classmethod
    def unused(cls, known: int, labels: Iterable[Any]) -> list[str]:
        """Nothing: a number is no name."""
        return []

    def head(self) -> dict[str, Any]:
        """An output a number."""
        return {"num_labels": self.count}

    def feature(self, label: Any) -> list[float]:
        """The numbers."""
        found = _numbers(label)
        if len(found) != self.count:
            raise ValueError(f"has {len(found)} numbers as its label, but {self.count} are expected")
        return found

    def batch(self, features: Sequence[Sequence[float]]) -> Tensor:
        """``(rows, numbers)``, float32."""
        return torch.tensor([[float(n) for n in row] for row in features])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed squared error."""
        return F.mse_loss(logits.float(), labels, reduction="sum")

    def metrics(self) -> MetricCollection:
        """Pearson's and Spearman's correlation and the mean squared error, the means over the numbers of a row."""
        return MetricCollection({"correlations": Correlations(), "mse": MeanSquaredError()})

    def update(self, metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the metrics."""
        metrics.update(logits.float(), labels)

    def answers(self, logits: Tensor) -> list[dict[str, Any]]:
        """The number, or the list of them, as a row's label has it."""
        return [{"value": row[0] if self.count == 1 else row} for row in logits.float().tolist()]


def _numbers(value: Any) -> list[float]:
    found = [_number(v, value) for v in (value if isinstance(value, list | tuple) else [value])]
    if not found:
        raise ValueError("has an empty list as its label, but a number is expected")
    return found


def _number(value: Any, label: Any) -> float:
    try:  # tables of text hold numbers as words
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"has the label {label!r}, but a finite number, or a list of them, is expected")
    return number
