"""Language modelling of plain text, in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.counted import Counted
from lightning_peft.tasks.language_model import (
    NextToken,
    before_text,
    end_of_text,
    without_beginning,
    write,
)
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs


@dataclass
class CausalLM(NextToken):
    """Learns to continue texts: they are joined, each with its end-of-text token, and cut into blocks.

    A block's first token is the last one of the block before, so that every token of every text is predicted exactly
    once, from what stands before it in its block; the last block may be short. Validation and test run in the same
    blocks. A model may look across the end of a text into the one before, as in pretraining.

    Args:
        all_logits: whether logits are computed for all tokens, as the model does by itself, not only for those that
            the loss counts and in chunks. Results are the same; it takes more memory and time.
        packing: whether rows of a batch are put one behind the other instead of padded, where the model keeps them
            apart. Results are the same; without it padding takes memory and time too.
    """

    all_logits: bool = False
    packing: bool = True

    columns: ClassVar[tuple[Columns, ...]] = (Columns(("text",)),)
    whole_texts: ClassVar[bool] = True

    def to_config(self) -> dict[str, Any]:
        """The task's name as plain values."""
        return {"name": "causal_lm"}

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids of whole texts with the bytes that each token stands for, or of the prompts to continue.

        Raises:
            ValueError: if a text is empty.
        """
        texts = [str(row["text"]) for row in rows]
        if not all(text.strip() for text in texts):
            raise ValueError(f"has no text: {next(t for t in texts if not t.strip())!r}")
        start, end = before_text(tokenizer), end_of_text(tokenizer)
        options = {"add_special_tokens": False, "verbose": False}
        if not training:
            prompts = tokenizer(texts, **options)["input_ids"]
            return [{"input_ids": without_beginning(start + ids, tokenizer, max_length)} for ids in prompts]
        found = tokenizer(texts, return_offsets_mapping=tokenizer.is_fast, **options)
        offsets = found.get("offset_mapping") or [None] * len(texts)
        return [
            {
                "input_ids": start + ids + end,
                "bytes": [0] * len(start) + _bytes(text, len(ids), where) + [0] * len(end),
            }
            for text, ids, where in zip(texts, found["input_ids"], offsets, strict=True)
        ]

    def join(self, features: Iterable[dict[str, Any]], tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
        """Blocks of all texts in their order; ``bytes`` is how many of them the block's predicted tokens stand for."""
        # the first text is preceded by what precedes every other
        ids: list[int] = [] if before_text(tokenizer) else end_of_text(tokenizer)
        counts = [0] * len(ids)
        for feature in features:
            ids += feature["input_ids"]
            counts += feature["bytes"]
            while len(ids) > max_length:
                yield {"input_ids": ids[:max_length], "bytes": sum(counts[1:max_length])}
                ids, counts = ids[max_length - 1 :], counts[max_length - 1 :]
        if len(ids) > 1:
            yield {"input_ids": ids, "bytes": sum(counts[1:])}

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, tokens)``; ``bytes``: ``(batch,)``.

        Prompts alone are padded on the left.
        """
        batch = pad_inputs(features, tokenizer, left=not training)
        if training:
            batch["labels"] = pad([f["input_ids"] for f in features], IGNORED)
            batch["bytes"] = torch.tensor([int(f["bytes"]) for f in features])
        return batch

    def metrics(self) -> MetricCollection:
        """The share of tokens that the model would have written itself, and how many bytes a token stands for."""
        return MetricCollection({"token_accuracy": MeanMetric(), "bytes_per_token": MeanMetric()}, compute_groups=False)

    def update(self, metrics: MetricCollection, outputs: Counted, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        super().update(metrics, outputs, batch)
        tokens = outputs.labels.numel()
        metrics["bytes_per_token"].update(batch["bytes"].sum() / max(tokens, 1), weight=tokens)

    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """How the model continues each text; greedy, 64 tokens at most, unless told otherwise."""
        return [{"continuation": t} for t in write(model, batch, tokenizer, end_of_text(tokenizer), **generation)]


def _bytes(text: str, tokens: int, offsets: list[tuple[int, int]] | None) -> list[int]:
    """How many bytes of UTF-8 each token stands for; together they are the text's.

    What a tokenizer leaves out, such as spaces, belongs to the token behind it, or to the last one. Of several tokens
    in one character the first has it all. Tokenizers that do not tell their places share the text out evenly.
    """
    if tokens == 0:
        return []
    if offsets is None:
        ends = np.arange(1, tokens + 1) * len(text) // tokens
    else:
        ends = np.maximum.accumulate(np.array(offsets)[:, 1])
    ends[-1] = len(text)
    upto = np.concatenate([[0], np.cumsum([len(c.encode(errors="surrogatepass")) for c in text])])
    return [int(n) for n in np.diff(upto[ends], prepend=0)]
