"""What a row's label is, and what the outputs of a model's head say about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torchmetrics import MetricCollection


class Target(Protocol):
    """A kind of label. Logits are ``(rows, outputs)``.

    Attributes:
        option: the task's option that says what labels there are.
        monitor: the metric by which checkpoints are chosen, and ``mode``, whether more or less of it is better.
    """

    option: ClassVar[str]
    monitor: ClassVar[str]
    mode: ClassVar[str]

    def __init__(self, known: Any, *, by_number: bool) -> None: ...

    @classmethod
    def learn(cls, labels: Iterable[Any]) -> Any:
        """The option's value, from the labels of the training rows."""
        ...

    @classmethod
    def unused(cls, known: Any, labels: Iterable[Any]) -> list[str]:
        """What of the option's value occurs in no row."""
        ...

    def head(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to know to make the head."""
        ...

    def feature(self, label: Any) -> Any:
        """A row's label in numbers.

        Raises:
            ValueError: if it cannot be used; the sentence goes on behind the row's place.
        """
        ...

    def batch(self, features: Sequence[Any]) -> Tensor:
        """The labels of some rows."""
        ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over all entries of ``labels``."""
        ...

    def metrics(self) -> MetricCollection:
        """Fresh metrics."""
        ...

    def update(self, metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the metrics."""
        ...

    def answers(self, logits: Tensor) -> list[dict[str, Any]]:
        """What the logits say about each row, in plain values."""
        ...
