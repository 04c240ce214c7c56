"""What tasks have in common whose rows have a label: the model's head is a class, or a number, an output."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.tasks.class_names import class_name
from lightning_peft.tasks.padding import without_labels
from lightning_peft.tasks.targets import Target


def named_classes(labels: list[Any] | None) -> tuple[list[str] | None, list[str]]:
    """The names that the option ``labels`` gives, and what is wrong with them.

    Args:
        labels: the option's value.

    Returns:
        The names as words, and sentences.
    """
    names = None if labels is None else [class_name(label) for label in labels]
    twice = [name for name, count in Counter(names or ()).items() if count > 1]
    wrong = ["labels is empty; leave it out to take those of the training data"] if names == [] else []
    return names, wrong + ([f"labels names {twice[0]!r} twice"] if twice else [])


class LabelledTask(ABC):
    """A task that learns the column ``label``.

    A subclass is a dataclass that has the option of its kind of label as a field, and sets ``_given``: whether the
    user gave it. The order of names that were learnt is ours, so a number in the data cannot mean it.
    """

    _given: bool

    @property
    @abstractmethod
    def _kind(self) -> type[Target]:
        """The kind of label."""

    @property
    def monitor(self) -> str:
        """The metric by which checkpoints are chosen: the accuracy of single labels."""
        return self._kind.monitor

    @property
    def mode(self) -> str:
        """Whether more or less of what is monitored is better."""
        return self._kind.mode

    def _target(self) -> Target:
        option = self._kind.option
        known = getattr(self, option)
        if known is None:
            raise ValueError(
                f"{type(self).__name__} does not know its {option} yet: give {option}=..., or let the data's setup run "
                "first, which takes them from the training examples"
            )
        return self._kind(known, by_number=self._given)

    def model_kwargs(self) -> dict[str, Any]:
        """The head's size and the names of the classes; a head of another size, as a base may have, is made anew."""
        return {**self._target().head(), "ignore_mismatched_sizes": True}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes from the training rows what was not given: the labels, or how many numbers a row has.

        Raises:
            ValueError: if no row has a label that can be used, or there are fewer than two classes.
        """
        found = [row["label"] for row in rows]
        known = getattr(self, self._kind.option)
        if known is None:
            setattr(self, self._kind.option, self._kind.learn(found))
        elif unused := self._kind.unused(known, found):
            shown = ", ".join(map(repr, unused[:5])) + (", ..." if len(unused) > 5 else "")
            warnings.warn(f"no training row has the label {shown}, of the {len(known)} that were given", stacklevel=2)

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch; the loss is taken outside of it, so that it can be summed."""
        return model(**without_labels(batch))

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of decisions: of rows, or of all labels or numbers of all rows."""
        labels = batch["labels"]
        return self._target().loss(outputs.logits, labels), torch.tensor(labels.numel(), device=labels.device)

    def metrics(self) -> MetricCollection:
        """Fresh metrics of the kind of label."""
        return self._target().metrics()

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        self._target().update(metrics, outputs.logits, batch["labels"])

    @torch.no_grad()
    def predict(
        self, model: Any, batch: dict[str, Any], processing_class: Any, **generation: Any
    ) -> list[dict[str, Any]]:
        """What the model says to each row, as the kind of label says it."""
        return self._target().answers(self.outputs(model, batch).logits)
