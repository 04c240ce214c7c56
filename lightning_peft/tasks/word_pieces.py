"""Words as the pieces that a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_pieces(sentences: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Token ids of sentences, and where the first piece of each word is.

    The words are tokenized as a text with spaces between them. Given to a tokenizer as words, those of a byte-level one
    that sets no space before a text (GPT-2's, RoBERTa's) are cut as if each began a text, which training never saw.

    Args:
        sentences: lists of words.
        tokenizer: a tokenizer that tells offsets.
        max_length: tokens that a sentence is cut to.

    Returns:
        For each sentence ``input_ids``, perhaps ``token_type_ids``, and ``starts``: for each word the place of its
        first piece, or -1 where it has none, because it was cut off or the tokenizer makes nothing of it.

    Raises:
        TypeError: if the tokenizer cannot tell offsets.
    """
    if not tokenizer.is_fast:
        raise TypeError(
            f"tagging words needs a tokenizer that tells which piece belongs to which word; {type(tokenizer).__name__} "
            "is written in Python and does not: choose a model with a tokenizer.json"
        )
    texts = [" ".join(words) for words in sentences]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    kept = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [
        {**{name: encoded[name][n] for name in kept}, "starts": _starts(words, encoded["offset_mapping"][n])}
        for n, words in enumerate(sentences)
    ]


def _starts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    word_at: list[int | None] = []  # of each character
    for number, word in enumerate(words):
        word_at += [number] * len(word) + [None]
    starts = [-1] * len(words)
    for place, (begin, end) in enumerate(offsets):
        # by its last character: a piece may begin with the space before its word
        its_word = word_at[end - 1] if begin < end else None
        if its_word is not None and starts[its_word] == -1:
            starts[its_word] = place
    return starts
