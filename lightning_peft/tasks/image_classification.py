"""A label for an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.core.problems import raise_problems
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.labelled import LabelledTask, named_classes
from lightning_peft.tasks.single_label import RankedLabel
from lightning_peft.tasks.targets import Target


@dataclass
class ImageClassification(LabelledTask):
    """Sorts images into classes, with transformers' models for image classification such as ViT (arXiv 2010.11929).

    Rows have an ``image`` and a ``label``, a name or a number. The loss is the cross-entropy, the mean over images.

    Args:
        labels: the classes' names in the order of their numbers. None takes those of the training data, sorted. Where
            names are given, rows may hold their numbers.

    Raises:
        ValueError: if no name is given, or one twice.
    """

    labels: list[str] | None = None

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    # PEFT's task types name heads for text; for images its users leave the type out
    peft_task_type: ClassVar[str | None] = None
    processing_auto_class: ClassVar[str] = "AutoImageProcessor"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("image",), ("label",)),)

    def __post_init__(self) -> None:
        self.labels, wrong = named_classes(self.labels)
        raise_problems("ImageClassification", wrong)
        self._given = self.labels is not None

    @property
    def _kind(self) -> type[Target]:
        return RankedLabel

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        return {"name": "image_classification", **asdict(self)}

    def encode(self, rows: list[dict[str, Any]], *, training: bool) -> list[dict[str, Any]]:
        """The label's number, unless ``training`` is false.

        Raises:
            ValueError: if a label cannot be used.
        """
        if not training:
            return [{} for _ in rows]
        target = self._target()
        return [{"labels": target.feature(row["label"])} for row in rows]

    def collate(self, features: list[dict[str, Any]], processor: Any, *, training: bool) -> dict[str, Tensor]:
        """``pixel_values``: ``(batch, channels, height, width)``, and ``labels``: ``(batch,)``."""
        batch = dict(processor([f["image"] for f in features], return_tensors="pt"))
        if training:
            batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch
