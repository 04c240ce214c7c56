"""What `PeftModule` and the data ask of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.tasks.columns import Columns


class Task(Protocol):
    """A kind of task: a dataclass of plain values.

    Attributes:
        auto_class: transformers' auto-model class with the right head.
        peft_task_type: Hugging Face PEFT's name for the task; None where it has none.
        columns: the shapes that the data may have.
    """

    auto_class: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    columns: ClassVar[tuple[Columns, ...]]

    @property
    def monitor(self) -> str:
        """The metric by which checkpoints are chosen."""
        ...

    @property
    def mode(self) -> str:
        """Whether more (``"max"``) or less (``"min"``) of what is monitored is better."""
        ...

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        ...

    def model_kwargs(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to know to make the head."""
        ...

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes from the training rows what the task must know, such as the labels."""
        ...

    def collate(self, features: list[dict[str, Any]], processing_class: Any, /, *, training: bool) -> dict[str, Tensor]:
        """A batch."""
        ...

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch."""
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

    def predict(
        self, model: Any, batch: dict[str, Any], processing_class: Any, /, **generation: Any
    ) -> list[dict[str, Any]]:
        """What the model says to each row, in plain values."""
        ...


class TextTask(Task, Protocol):
    """A task about texts. Its batches are padded to their longest row, ``(batch, tokens)``.

    Attributes:
        whole_texts: whether a plain text file is one row; otherwise each of its lines is one.
    """

    whole_texts: ClassVar[bool]

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Rows of text as rows of token ids (and labels, unless ``training`` is false: then only the inputs).

        Raises:
            ValueError: if a row cannot be used; the sentence goes on behind the row's place.
        """
        ...


class ImageTask(Task, Protocol):
    """A task about images; of a row's features ``image`` is the image itself when a batch is made of them."""

    def encode(self, rows: list[dict[str, Any]], *, training: bool) -> list[dict[str, Any]]:
        """Rows as what belongs to the image: the label, unless ``training`` is false.

        Raises:
            ValueError: if a row cannot be used; the sentence goes on behind the row's place.
        """
        ...


@runtime_checkable
class Processed(Protocol):
    """A task whose inputs are made ready by something else than a tokenizer.

    Attributes:
        processing_auto_class: transformers' auto class of that, such as ``"AutoImageProcessor"``.
    """

    processing_auto_class: ClassVar[str]


def processing_auto_class(task: Task) -> str:
    """Transformers' auto class of what makes a task's inputs ready.

    Args:
        task: the task.
    """
    return task.processing_auto_class if isinstance(task, Processed) else "AutoTokenizer"


@runtime_checkable
class Joining(Protocol):
    """A task that trains on something else than rows, such as blocks of a running text."""

    def join(self, features: Iterable[dict[str, Any]], tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
        """Features to train on, out of those of the rows."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A task that cuts a part of its rows to a length of its own, besides the data's ``max_length``."""

    def uncut(self) -> TextTask:
        """The same task without that length."""
        ...


@runtime_checkable
class InOtherUnits(Protocol):
    """A task whose mean loss is also said in other units, such as perplexity."""

    def from_loss(self, loss: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """More metrics, out of the mean loss and the metrics that there are."""
        ...


@runtime_checkable
class Writing(Protocol):
    """A task whose evaluation may also judge what the model writes."""

    def score_written(
        self, metrics: MetricCollection, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any
    ) -> None:
        """Lets the model write and adds how that compares with what was expected."""
        ...


@runtime_checkable
class Templated(Protocol):
    """A task that says how conversations look; its tokenizer is saved with the adapter."""

    def tokenizer_for(self, tokenizer: Any) -> Any:
        """The tokenizer with the form that the task gives to conversations."""
        ...


@runtime_checkable
class Checking(Protocol):
    """A task that cannot be trained with every adapted model."""

    def check_model(self, model: Any) -> None:
        """Refuses a model before any time is spent.

        Raises:
            ValueError: if the task cannot be trained with it.
        """
        ...
