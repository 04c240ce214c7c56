"""Rows of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not supervised."""


def pad_token(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, or its end of text where it has none, or 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model is called with."""
    return {k: v for k, v in batch.items() if k != "labels"}


def pad(rows: Sequence[Any], value: int, *, left: bool = False) -> Tensor:
    """Pads to the longest row.

    Args:
        rows: lists or arrays of numbers.
        value: what to pad with.
        left: pad before the row, as generation needs it.

    Returns:
        ``(rows, longest)``, int64.
    """
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    batch = np.full((len(rows), longest), value, dtype=np.int64)
    places = np.arange(longest)
    batch[places >= (longest - lengths)[:, None] if left else places < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(batch)


def pad_inputs(features: list[dict[str, Any]], tokenizer: Any, *, left: bool = False) -> dict[str, Tensor]:
    """Input ids and their mask, padded to the longest row, and the ids' types where they tell anything.

    Args:
        features: rows with ``input_ids``, and perhaps ``token_type_ids``.
        tokenizer: the tokenizer, for its padding token.
        left: pad before the rows.
    """
    ids = [f["input_ids"] for f in features]
    mask = [np.ones(len(row), dtype=np.int64) for row in ids]
    batch = {"input_ids": pad(ids, pad_token(tokenizer), left=left), "attention_mask": pad(mask, 0, left=left)}
    types = [f["token_type_ids"] for f in features if "token_type_ids" in f]
    # zeros are what a model takes by itself, and one beside a tokenizer of another kind may not know the name
    if types and any(np.any(row) for row in types):
        batch["token_type_ids"] = pad(types, tokenizer.pad_token_type_id, left=left)
    return batch
