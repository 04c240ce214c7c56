"""Rows with any number of classes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

from lightning_peft.tasks.auroc import MacroAUROC
from lightning_peft.tasks.class_names import ClassNumbers, class_name, in_order, readable


class MultiLabel:
    """A list of names or numbers a row, which may be empty; the loss is the binary cross-entropy.

    Args:
        known: the classes in the order of their numbers.
        by_number: whether labels may be those numbers.
    """

    option: ClassVar[str] = "labels"
    monitor: ClassVar[str] = "val/f1_micro"
    mode: ClassVar[str] = "max"

    def __init__(self, known: list[str], *, by_number: bool) -> None:
        self.number = ClassNumbers(known, by_number=by_number)

    @classmethod
    def learn(cls, labels: Iterable[Any]) -> list[str]:
        """The classes of the training rows.

        Raises:
            ValueError: if there is none.
        """
        rows = readable(labels, lambda value: [class_name(label) for label in _listed(value)])
        found = in_order(name for row in rows for name in row)
        if not found:
            raise ValueError("the labels of all training rows are empty lists; one class at least is needed")
        return found

    @classmethod
    def unused(cls, known: list[str], labels: Iterable[Any]) -> list[str]:
        """Classes that no row has."""
        target = cls(known, by_number=True)
        seen = {number for row in readable(labels, target.feature) for number in row}
        return [known[n] for n in sorted({*range(len(known))} - seen)]

    def head(self) -> dict[str, Any]:
        """An output a class."""
        return self.number.head()

    def feature(self, label: Any) -> list[int]:
        """The classes' numbers."""
        found = [self.number(name) for name in _listed(label)]
        if len(set(found)) < len(found):
            raise ValueError(
                f"names a class twice in its label {label!r}; list the classes that the row has, not a 0 or 1 for each"
            )
        return found

    def batch(self, features: Sequence[Sequence[int]]) -> Tensor:
        """1 for each class that a row has: ``(rows, classes)``, float32."""
        labels = torch.zeros(len(features), len(self.number.names))
        for row, numbers in zip(labels, features, strict=True):
            row[[int(n) for n in numbers]] = 1
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")

    def metrics(self) -> MetricCollection:
        """Rows whose classes are all right, F1 over all decisions and as the mean over classes, area under the ROC."""
        classes = len(self.number.names)
        return MetricCollection(
            {
                "accuracy": MultilabelExactMatch(classes, validate_args=False),
                "f1_micro": MultilabelF1Score(classes, average="micro", validate_args=False),
                "f1_macro": MultilabelF1Score(classes, average="macro", validate_args=False),
                "auroc": MacroAUROC(),
            }
        )

    def update(self, metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the metrics."""
        metrics.update(logits.float().sigmoid(), labels.long())

    def answers(self, logits: Tensor) -> list[dict[str, Any]]:
        """The classes whose probability is above one half, and the probability of each."""
        names = self.number.names
        said = []
        for shares in logits.float().sigmoid().tolist():
            likely = [name for name, share in zip(names, shares, strict=True) if share > 0.5]
            said.append({"labels": likely, "probabilities": dict(zip(names, shares, strict=True))})
        return said


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"has the label {value!r}, but several labels are a list such as ['a', 'b'], in a format that has lists: "
            "JSON lines or Parquet"
        )
    return list(value)
