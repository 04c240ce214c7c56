"""Rows of different lengths as one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad_token(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, or its end of text where it has none, or 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def pad(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    """Pads to the longest row.

    Args:
        rows: the rows.
        value: what to pad with.
        left: pad before the row, as generation needs it.

    Returns:
        ``(rows, longest)``, int64.
    """
    longest = max(len(row) for row in rows)
    batch = torch.full((len(rows), longest), value, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        batch[i, place] = torch.tensor(row, dtype=torch.long)
    return batch


def pad_inputs(features: list[dict[str, Any]], tokenizer: Any, *, left: bool = False) -> dict[str, Tensor]:
    """Input ids and their mask, padded to the longest row.

    Args:
        features: rows with ``input_ids``.
        tokenizer: the tokenizer, for its padding token.
        left: pad before the rows.
    """
    ids = [f["input_ids"] for f in features]
    mask = [[1] * len(row) for row in ids]
    return {"input_ids": pad(ids, pad_token(tokenizer), left=left), "attention_mask": pad(mask, 0, left=left)}
