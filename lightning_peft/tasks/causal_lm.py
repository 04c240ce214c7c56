"""Writing a completion to a prompt; the loss counts on the completion only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.padding import pad, pad_inputs, pad_token, without_labels

_IGNORED = -100


@dataclass
class CausalLM:
    """Language modelling of prompt and completion, supervised on the completion and its end.

    Text that is too long loses the prompt's beginning first, so that a quarter of the window or the whole
    completion stays, then the completion's end.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("prompt",), ("completion",)),)
    whole_texts: ClassVar[bool] = False

    def to_config(self) -> dict[str, Any]:
        """The task's name as plain values."""
        return {"name": "causal_lm"}

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: a language model's head has the vocabulary's size."""
        return {}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Nothing: the task knows all that it needs."""

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, and labels that are -100 on the prompt.

        Raises:
            ValueError: if a row has an empty completion.
        """
        return [self._encode(row, tokenizer, max_length, training) for row in rows]

    def _encode(self, row: dict[str, Any], tokenizer: Any, max_length: int, training: bool) -> dict[str, Any]:
        start = _start(tokenizer)
        prompt = tokenizer(str(row["prompt"]), add_special_tokens=False)["input_ids"]
        if not training:
            room = max_length - len(start)
            return {"input_ids": start + prompt[-room:]}
        completion = tokenizer(str(row["completion"] or ""), add_special_tokens=False)["input_ids"]
        if not completion:
            raise ValueError(f"has no supervised token: its completion is {row['completion']!r}")
        completion = completion + _end(tokenizer)
        kept = min(len(completion), max(1, max_length // 4))
        prompt = prompt[-max(0, max_length - len(start) - kept) :] if len(start) + kept < max_length else []
        completion = completion[: max_length - len(start) - len(prompt)]
        before = start + prompt
        return {"input_ids": before + completion, "labels": [_IGNORED] * len(before) + completion}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, tokens)``; prompts alone are padded on the left."""
        batch = pad_inputs(features, tokenizer, left=not training)
        if training:
            batch["labels"] = pad([f["labels"] for f in features], _IGNORED)
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch; the loss is taken outside of it, so that it can be summed."""
        return model(**without_labels(batch))

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and the number of supervised tokens; logits are ``(batch, tokens, vocabulary)``."""
        logits, labels = _supervised(outputs.logits, batch["labels"])
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        return total, torch.tensor(labels.numel(), device=labels.device)

    def metrics(self) -> MetricCollection:
        """The share of supervised tokens that the model would have written itself."""
        return MetricCollection({"token_accuracy": MeanMetric()})

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        logits, labels = _supervised(outputs.logits, batch["labels"])
        metrics.update((logits.argmax(-1) == labels).float())

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The completion that the model writes to each prompt; greedy, 64 tokens at most, unless told otherwise."""
        options = {"max_new_tokens": 64, "do_sample": False, **generation}
        end = _end(tokenizer)
        options.setdefault("eos_token_id", end[0] if end else None)
        options.setdefault("pad_token_id", pad_token(tokenizer))
        inputs = without_labels(batch)
        written = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return [{"completion": t} for t in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _supervised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels where a token is predicted that counts: ``(supervised, vocabulary)``, ``(supervised,)``."""
    ahead = labels[:, 1:]
    where = ahead != _IGNORED
    return logits[:, :-1][where], ahead[where]


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: nothing, a beginning of text, or BERT's ``[CLS]``."""
    empty = tokenizer("")["input_ids"]
    first = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return [t for t in empty[:1] if t in first]


def _end(tokenizer: Any) -> list[int]:
    """The token that ends a completion; BERT-like tokenizers have ``[SEP]`` for it."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return [int(token)]
    return []
