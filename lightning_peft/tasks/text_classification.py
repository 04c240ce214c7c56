"""Labels for a text or a pair of texts: one, several, or numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.tasks.class_names import class_name
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.multi_label import MultiLabel
from lightning_peft.tasks.padding import pad_inputs, without_labels
from lightning_peft.tasks.regression import Regression
from lightning_peft.tasks.single_label import SingleLabel
from lightning_peft.tasks.targets import Target

_KINDS: dict[str, type[Target]] = {
    "single_label_classification": SingleLabel,
    "multi_label_classification": MultiLabel,
    "regression": Regression,
}


@dataclass
class TextClassification:
    """Sorts texts, or pairs of them, into classes, or gives them numbers.

    Rows have a ``text``, perhaps a ``text_pair`` (what does not fit is cut off the longer of the two), and a ``label``:
    a name or number; a list of those for several labels; a number or a list of as many in every row for a regression.

    Args:
        problem_type: as in transformers' configs: ``"single_label_classification"`` (cross-entropy),
            ``"multi_label_classification"`` (binary cross-entropy) or ``"regression"`` (squared error).
        labels: the classes' names in the order of their numbers. None takes those of the training data, sorted. Where
            names are given, rows may hold their numbers.
        num_labels: how many numbers a regression gives. None takes what the training data has.

    Raises:
        ValueError: if the problem type is unknown, or an option has no meaning for it.
    """

    problem_type: str = "single_label_classification"
    labels: list[str] | None = None
    num_labels: int | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("text",), ("label",), ("text_pair",)),)
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.problem_type not in _KINDS:
            raise ValueError(f"problem_type {self.problem_type!r} is unknown{nearest(self.problem_type, _KINDS)}")
        option = _KINDS[self.problem_type].option
        self.labels = None if self.labels is None else [class_name(label) for label in self.labels]
        twice = [name for name, count in Counter(self.labels or ()).items() if count > 1]
        raise_problems(
            "TextClassification",
            [
                "labels names classes, and a regression has none: leave it out (num_labels counts a row's numbers)"
                if self.labels is not None and option != "labels"
                else None,
                "num_labels counts the numbers of a regression; how many classes there are, labels says"
                if self.num_labels is not None and option != "num_labels"
                else None,
                f"num_labels must be 1 or more, but got {self.num_labels}"
                if self.num_labels is not None and self.num_labels < 1
                else None,
                "labels is empty; leave it out to take those of the training data" if self.labels == [] else None,
                f"labels names {twice[0]!r} twice" if twice else None,
            ],
        )
        # the order of names that were learnt is ours: a number in the data cannot mean it
        self._given = self.labels is not None

    @property
    def monitor(self) -> str:
        """The accuracy of single labels, the F1 over all decisions of several, the squared error of numbers."""
        return _KINDS[self.problem_type].monitor

    @property
    def mode(self) -> str:
        """Whether more or less of what is monitored is better."""
        return _KINDS[self.problem_type].mode

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        return {"name": "text_classification", **asdict(self)}

    def _target(self) -> Target:
        kind = _KINDS[self.problem_type]
        known = getattr(self, kind.option)
        if known is None:
            raise ValueError(
                f"TextClassification does not know its {kind.option} yet: give {kind.option}=..., or let the data's "
                "setup run first, which takes them from the training examples"
            )
        return kind(known, by_number=self._given)

    def model_kwargs(self) -> dict[str, Any]:
        """The head's size, the names of the classes, and what they are."""
        return {**self._target().head(), "problem_type": self.problem_type}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes from the training rows what was not given: the labels, or how many numbers a row has.

        Raises:
            ValueError: if no row has a label that can be used, or there are fewer than two classes.
        """
        kind = _KINDS[self.problem_type]
        found = [row["label"] for row in rows]
        known = getattr(self, kind.option)
        if known is None:
            setattr(self, kind.option, kind.learn(found))
        elif unused := kind.unused(known, found):
            shown = ", ".join(map(repr, unused[:5])) + (", ..." if len(unused) > 5 else "")
            warnings.warn(f"no training row has the label {shown}, of the {len(known)} that were given", stacklevel=2)

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, the text that each belongs to where the tokenizer tells, and the label in numbers.

        Raises:
            ValueError: if a label cannot be used.
        """
        features: list[dict[str, Any]] = [{}] * len(rows)
        for paired in (False, True):
            places = [i for i, row in enumerate(rows) if (row.get("text_pair") is not None) == paired]
            texts = [[str(rows[i][column]) for i in places] for column in ("text", "text_pair")[: 1 + paired]]
            encoded = tokenizer(*texts, truncation=True, max_length=max_length) if places else {}
            kept = [name for name in ("input_ids", "token_type_ids") if name in encoded]
            for n, i in enumerate(places):
                features[i] = {name: encoded[name][n] for name in kept}
        if training:
            target = self._target()
            for feature, row in zip(features, rows, strict=True):
                feature["labels"] = target.feature(row["label"])
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """Inputs of ``(batch, tokens)``; ``labels``: ``(batch,)``, or ``(batch, outputs)`` for several of them."""
        batch = pad_inputs(features, tokenizer)
        if training:
            batch["labels"] = self._target().batch([f["labels"] for f in features])
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch; the loss is taken outside of it, so that it can be summed."""
        return model(**without_labels(batch))

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of decisions: of rows, or of all labels or numbers of all rows."""
        labels = batch["labels"]
        return self._target().loss(outputs.logits, labels), torch.tensor(labels.numel(), device=labels.device)

    def metrics(self) -> MetricCollection:
        """Fresh metrics of the problem's type."""
        return self._target().metrics()

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        self._target().update(metrics, outputs.logits, batch["labels"])

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """``label``, ``score`` and ``probabilities``; ``labels`` and ``probabilities``; or ``value``."""
        return self._target().answers(self.outputs(model, batch).logits)
