"""Rows with one class each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lightning_peft.tasks.auroc import MacroAUROC
from lightning_peft.tasks.class_names import ClassNumbers, class_name, in_order, readable

_RANKED = 5


class SingleLabel:
    """A name or a number a row; the loss is the cross-entropy, the mean over rows.

    Args:
        known: the classes in the order of their numbers.
        by_number: whether labels may be those numbers.
    """

    option: ClassVar[str] = "labels"
    monitor: ClassVar[str] = "val/accuracy"
    mode: ClassVar[str] = "max"

    def __init__(self, known: list[str], *, by_number: bool) -> None:
        self.number = ClassNumbers(known, by_number=by_number)

    @classmethod
    def learn(cls, labels: Iterable[Any]) -> list[str]:
        """The classes of the training rows.

        Raises:
            ValueError: if there are fewer than two.
        """
        found = in_order(readable(labels, class_name))
        if len(found) < 2:
            raise ValueError(f"classification needs two labels or more, but the training data has only {found}")
        return found

    @classmethod
    def unused(cls, known: list[str], labels: Iterable[Any]) -> list[str]:
        """Classes that no row has."""
        number = ClassNumbers(known, by_number=True)
        return [known[n] for n in sorted({*range(len(known))} - set(readable(labels, number)))]

    def head(self) -> dict[str, Any]:
        """An output a class."""
        return self.number.head()

    def feature(self, label: Any) -> int:
        """The class's number."""
        return self.number(label)

    def batch(self, features: Sequence[int]) -> Tensor:
        """``(rows,)``, int64."""
        return torch.tensor([int(f) for f in features])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy."""
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def metrics(self) -> MetricCollection:
        """Accuracy over all rows, F1 as the mean over classes, Matthews' correlation, and the area under the ROC."""
        mcc = MulticlassMatthewsCorrCoef(len(self.number.names), validate_args=False)
        return MetricCollection({**self._decisions(), "mcc": mcc, "auroc": MacroAUROC()})

    def _decisions(self) -> dict[str, Metric]:
        """What judges the likeliest class alone."""
        classes = len(self.number.names)
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "f1_macro": MulticlassF1Score(classes, average="macro", validate_args=False),
        }

    def update(self, metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the metrics."""
        metrics.update(logits.float().softmax(-1), labels)

    def answers(self, logits: Tensor) -> list[dict[str, Any]]:
        """The likeliest class, its probability, and the probability of each."""
        names = self.number.names
        said = []
        for shares in logits.float().softmax(-1).tolist():
            best = max(range(len(names)), key=shares.__getitem__)
            said.append(
                {"label": names[best], "score": shares[best], "probabilities": dict(zip(names, shares, strict=True))}
            )
        return said


class RankedLabel(SingleLabel):
    """A single label among classes that may be many: what counts is also whether it is among the likeliest five."""

    def metrics(self) -> MetricCollection:
        """Accuracy, F1 as the mean over classes, and how often the class is among the likeliest five of more."""
        classes = len(self.number.names)
        top = MulticlassAccuracy(classes, top_k=_RANKED, average="micro", validate_args=False)
        # among five classes every answer would be right
        found: dict[str, Any] = {**self._decisions(), **({"top5": top} if classes > _RANKED else {})}
        # torchmetrics takes metrics whose counts agree on the first batch for one, and from then on updates one only
        return MetricCollection(found, compute_groups=False)

    def answers(self, logits: Tensor) -> list[dict[str, Any]]:
        """The likeliest class, its probability, and the probabilities of the likeliest five."""
        names = self.number.names
        shares, places = logits.float().softmax(-1).topk(min(_RANKED, len(names)))
        said = []
        for some, which in zip(shares.tolist(), places.tolist(), strict=True):
            ranked = dict(zip((names[n] for n in which), some, strict=True))
            said.append({"label": names[which[0]], "score": some[0], "probabilities": ranked})
        return said
