"""Writing a target to a source with an encoder-decoder model such as T5 or BART."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs
from lightning_peft.tasks.written_texts import update_written, written_metrics

_INPUTS = ("input_ids", "attention_mask")
_EXPECTED = "expected"


@dataclass
class Seq2Seq:
    """Translation, summaries and the like: the encoder reads the source, the decoder is supervised on the target.

    Both are cut at their end when they are too long.

    Args:
        max_target_length: tokens that a target is cut to, its end token included, from 1 on. None takes the data's
            ``max_length``. Targets are often much shorter than sources, and so are the answers that are generated.
        predict_with_generate: also let the model write its answers in validation and test, and measure them: exact
            match, BLEU, chrF, ROUGE. Off by default, since writing takes many times as long as reading.

    Raises:
        ValueError: if ``max_target_length`` is out of its range.
    """

    max_target_length: int | None = None
    predict_with_generate: bool = False

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("source",), ("target",)),)
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_target_length is not None and self.max_target_length < 1:
            raise ValueError(f"Seq2Seq: max_target_length must be 1 or more, but got {self.max_target_length}")

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        return {"name": "seq2seq", **asdict(self)}

    def uncut(self) -> Seq2Seq:
        """The same task with targets as long as the data lets them be."""
        return replace(self, max_target_length=None)

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the head has the vocabulary's size."""
        return {}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Nothing: the task knows all that it needs."""

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids of the source, and labels: those of the target, with the tokenizer's own special tokens.

        Raises:
            ValueError: if a source or a target is empty.
        """
        for row in rows:
            for column in ("source", "target") if training else ("source",):
                if not str(row[column]).strip():
                    raise ValueError(f"has an empty {column}: {row[column]!r}")
        sources = tokenizer([str(r["source"]) for r in rows], truncation=True, max_length=max_length)["input_ids"]
        features: list[dict[str, Any]] = [{"input_ids": ids} for ids in sources]
        if training:
            limit = self.max_target_length or max_length
            targets = [str(r["target"]) for r in rows]
            labels = tokenizer(text_target=targets, truncation=True, max_length=limit)["input_ids"]
            for feature, ids, target in zip(features, labels, targets, strict=True):
                feature["labels"] = ids
                if self.predict_with_generate:
                    feature[_EXPECTED] = target
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``: ``(batch, source)``; ``labels``: ``(batch, target)``, padded with -100."""
        batch: dict[str, Any] = pad_inputs(features, tokenizer)
        if training:
            batch["labels"] = pad([f["labels"] for f in features], IGNORED)
            if self.predict_with_generate:
                batch[_EXPECTED] = [str(f[_EXPECTED]) for f in features]
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch, the decoder being given the target moved on by one token."""
        inputs = {k: batch[k] for k in _INPUTS}
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        else:  # such as M2M-100: it makes them within its forward alone, beside a loss that nothing here uses
            inputs["labels"] = batch["labels"]
        return model(**inputs)

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and the number of target tokens; logits are ``(batch, target, vocabulary)``."""
        labels = batch["labels"]
        total = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return total, (labels != IGNORED).sum()

    def from_loss(self, loss: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The perplexity of a target token."""
        return {"perplexity": loss.exp()}

    def metrics(self) -> MetricCollection:
        """The share of target tokens that the model would have written itself, and metrics on what it writes."""
        found = written_metrics() if self.predict_with_generate else MetricCollection({})
        found.add_metrics({"token_accuracy": MeanMetric()})
        return found

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        labels = batch["labels"]
        counts = labels != IGNORED
        metrics["token_accuracy"].update((outputs.logits.argmax(-1) == labels)[counts].float())

    def score_written(
        self, metrics: MetricCollection, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any
    ) -> None:
        """Lets the model write a batch's targets, if that was asked for, and adds them to the metrics."""
        if self.predict_with_generate:
            said = self.predict(model, batch, tokenizer, **generation)
            update_written(metrics, [row["target"] for row in said], batch[_EXPECTED])

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The target that the model writes to each source.

        Unless told otherwise nothing is drawn at random, and ``max_target_length`` tokens are the most, or 64; what
        else the model's own generation settings say, such as a beam, holds.
        """
        options = {"max_new_tokens": self.max_target_length or 64, "do_sample": False, **generation}
        if "max_length" in generation:
            del options["max_new_tokens"]
        written = model.generate(**{k: batch[k] for k in _INPUTS}, **options)
        return [{"target": t} for t in tokenizer.batch_decode(written, skip_special_tokens=True)]
