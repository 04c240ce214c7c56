"""Rows that have come out empty: nothing to read, or nothing to learn."""

from __future__ import annotations

from typing import Any

from lightning_peft.data.parts import IDS, LABELS
from lightning_peft.tasks.padding import IGNORED


def refuse_empty(feature: dict[str, Any], tokenizer: Any, max_length: int, *, training: bool) -> None:
    """Refuses features with no token of their own, or of which nothing is learnt.

    Args:
        feature: a row as the task encodes it.
        tokenizer: the tokenizer, for the tokens that it puts around every text.
        max_length: tokens that rows are cut to.
        training: whether something must be learnt; a prompt to go on from may be empty but for a first token.

    Raises:
        ValueError: if the features are empty; the sentence goes on behind the row's place.
    """
    around = _around(tokenizer) if training else frozenset()
    there = any(values for column, values in feature.items() if column.endswith(IDS))
    for column, values in feature.items():
        # no ids at all beside a column with some: a text that a row of this shape does not have
        if column.endswith(IDS) and (values or not there) and all(token in around for token in values):
            raise ValueError(f"is empty: no token is left of it{_of(column)} but those that begin and end every text")
        if training and column.endswith(LABELS) and isinstance(values, list) and set(values) == {IGNORED}:
            raise ValueError(f"has no supervised token{_of(column)} within max_length={max_length}")


def _of(column: str) -> str:
    name = column.removesuffix(IDS).removesuffix(LABELS).rstrip("_")
    return f" in {name!r}" if name else ""


def _around(tokenizer: Any) -> frozenset[int]:
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    # a token that also stands for unknown words, as GPT-2's does, may be text
    return frozenset(getattr(tokenizer, n) for n in names) - {None, tokenizer.unk_token_id}
