"""Labels for a text or a pair of texts: one, several, or numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.labelled import LabelledTask, named_classes
from lightning_peft.tasks.multi_label import MultiLabel
from lightning_peft.tasks.padding import pad_inputs
from lightning_peft.tasks.regression import Regression
from lightning_peft.tasks.single_label import SingleLabel
from lightning_peft.tasks.targets import Target

_KINDS: dict[str, type[Target]] = {
    "single_label_classification": SingleLabel,
    "multi_label_classification": MultiLabel,
    "regression": Regression,
}


@dataclass
class TextClassification(LabelledTask):
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
        self.labels, wrong = named_classes(self.labels)
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
                *wrong,
            ],
        )
        self._given = self.labels is not None

    @property
    def _kind(self) -> type[Target]:
        return _KINDS[self.problem_type]

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        return {"name": "text_classification", **asdict(self)}

    def model_kwargs(self) -> dict[str, Any]:
        """The head's size, the names of the classes, and what they are."""
        return {**super().model_kwargs(), "problem_type": self.problem_type}

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
