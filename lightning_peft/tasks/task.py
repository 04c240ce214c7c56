"""What `PeftModule` and the data ask of a task."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor
from torchmetrics import MetricCollection


class Task(Protocol):
    """A kind of task: a dataclass of plain values.

    Attributes:
        auto_class: transformers' auto-model class with the right head.
        peft_task_type: Hugging Face PEFT's name for the task.
        monitor: the metric by which checkpoints are chosen, and ``mode``, whether more or less of it is better.
        required_columns: columns that training data must have.
        input_columns: those that suffice to predict.
    """

    auto_class: ClassVar[str]
    peft_task_type: ClassVar[str]
    monitor: ClassVar[str]
    mode: ClassVar[str]
    required_columns: ClassVar[tuple[str, ...]]
    input_columns: ClassVar[tuple[str, ...]]

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        ...

    def model_kwargs(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to know to make the head."""
        ...

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes from the training rows what the task must know, such as the labels."""
        ...

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Rows of text as rows of token ids (and labels, unless ``training`` is false: then only the inputs)."""
        ...

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """A batch, padded to its longest row; ``(batch, tokens)``."""
        ...

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What of a batch the model is called with."""
        ...

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the units' losses and the number of units."""
        ...

    def metrics(self) -> MetricCollection:
        """Fresh metrics."""
        ...

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        ...

    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """What the model says to each row, in plain values."""
        ...
