"""One label for a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.core.problems import nearest
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.padding import pad_inputs, without_labels


@dataclass
class TextClassification:
    """Sorts texts into classes; the loss is the cross-entropy.

    Args:
        labels: the classes' names in the order of their numbers. None takes those of the training data, sorted.
    """

    labels: list[str] | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    monitor: ClassVar[str] = "val/accuracy"
    mode: ClassVar[str] = "max"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("text",), ("label",)),)
    whole_texts: ClassVar[bool] = False

    def to_config(self) -> dict[str, Any]:
        """The task's name and labels as plain values."""
        return {"name": "text_classification", **asdict(self)}

    def _names(self) -> list[str]:
        if not self.labels:
            raise ValueError(
                "TextClassification does not know its labels yet: give labels=[...], or let the data's setup run "
                "first, which takes them from the training examples"
            )
        return self.labels

    def model_kwargs(self) -> dict[str, Any]:
        """The head's size and the names of the classes."""
        names = self._names()
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {n: i for i, n in enumerate(names)},
        }

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes the labels from the training rows, if none were given.

        Raises:
            ValueError: if there are fewer than two.
        """
        if self.labels is None:
            found = sorted(
                {str(r["label"]) for r in rows},
                key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n),
            )
            if len(found) < 2:
                raise ValueError(f"classification needs two labels or more, but the training data has only {found}")
            self.labels = found

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, and the label's number where there is one."""
        ids = tokenizer([str(r["text"]) for r in rows], truncation=True, max_length=max_length)["input_ids"]
        features = [{"input_ids": row} for row in ids]
        if training:
            numbers = {n: i for i, n in enumerate(self._names())}
            for i, row in enumerate(rows):
                name = str(row["label"])
                if name not in numbers:
                    raise ValueError(f"has the label {name!r}, which training does not know{nearest(name, numbers)}")
                features[i]["labels"] = numbers[name]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``: ``(batch, tokens)``; ``labels``: ``(batch,)``."""
        batch = pad_inputs(features, tokenizer)
        if training:
            batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch; the loss is taken outside of it, so that it can be summed."""
        return model(**without_labels(batch))

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and the number of examples; logits are ``(batch, classes)``."""
        labels = batch["labels"]
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        return total, torch.tensor(labels.numel(), device=labels.device)

    def metrics(self) -> MetricCollection:
        """Accuracy over all examples and F1 averaged over the classes."""
        classes = len(self._names())
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        metrics.update(outputs.logits.argmax(-1), batch["labels"])

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The likeliest label of each row and its probability."""
        shares = self.outputs(model, batch).logits.float().softmax(-1)
        best, which = shares.max(-1)
        names = self._names()
        return [{"label": names[i], "score": p} for i, p in zip(which.tolist(), best.tolist(), strict=True)]
