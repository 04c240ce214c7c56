"""A conversation's tokens, so cut that none begins before an answer and ends within it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

# a template writes its own beginning, and how long a text may be is no question of it
AS_IT_IS: dict[str, Any] = {"add_special_tokens": False, "verbose": False}


def tokens_of(tokenizer: Any, text: str, starts: list[int]) -> tuple[Any, Any]:
    """The tokens that a model meets when it is asked for the answers in a text.

    A template that asks for an answer with a space at its end leaves the model to go on behind that space, whereas in
    the whole conversation the space is part of the answer's first token. There the text is cut before it is tokenized.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        text: a conversation as its template writes it.
        starts: where in it answers begin.

    Returns:
        The ids, and the character at which each begins, both ``(tokens,)``.

    Raises:
        ValueError: if the text cannot be cut without a space that is not in it.
    """
    ids, begins, ends = _with_places(tokenizer, text)
    over = {start: ids[(begins < start) & (ends > start)] for start in starts}
    joined = [start for start, found in over.items() if found.size and found[0] not in tokenizer.added_tokens_decoder]
    if not joined:
        return ids, begins
    edges = [0, *joined, len(text)]
    pieces = [_with_places(tokenizer, text[a:b]) for a, b in itertools.pairwise(edges)]
    apart = np.concatenate([piece[0] for piece in pieces])
    if _decoded(tokenizer, apart) != _decoded(tokenizer, ids):
        raise ValueError(
            f"has an answer whose first token begins before it, within {text[: joined[0]][-12:]!r}: this tokenizer "
            "puts a space before a text's first word, so the chat template must write the space with the answer, not "
            "at the end of what asks for one"
        )
    return apart, np.concatenate([piece[1] + edge for piece, edge in zip(pieces, edges, strict=False)])


def _with_places(tokenizer: Any, text: str) -> tuple[Any, Any, Any]:
    found = tokenizer(text, return_offsets_mapping=True, **AS_IT_IS)
    begins, ends = np.array(found["offset_mapping"]).reshape(-1, 2).T
    return np.array(found["input_ids"]), begins, ends


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
