"""Rows that no training here sees, as batches: what a model makes of them before and after it is compared."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_peft.data.docstrings import module_texts
from lightning_peft.data.rows import RowDataModule
from lightning_peft.data.sources import from_files
from lightning_peft.tasks.language_model import before_text
from lightning_peft.tasks.padding import pad_inputs

Batch = dict[str, Tensor]

T = TypeVar("T")
_BATCH = 8  # rows that run at a time


def held_out_texts(texts: str | Path | Sequence[str] | None, rows: int, data: Any = None) -> list[str]:
    """Texts to compare on.

    Args:
        texts: a file, a folder or a pattern, of which the lines or the column ``text`` are taken; the texts
            themselves; None takes docstrings of the standard library's modules that are no training row.
        rows: how many, from the first on.
        data: the run's data module, whose training rows are looked at.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no text.
    """
    if texts is None:
        seen = _trained_on(data)
        found = list(islice((text for text in module_texts() if text not in seen), rows))
    elif isinstance(texts, str | Path):
        read = ((example.row or {}).get("text") for example in from_files(texts))
        found = list(islice((text for text in read if isinstance(text, str) and text.strip()), rows))
    else:
        found = [str(text) for text in islice(texts, rows)]
    if not found or not all(text.strip() for text in found):
        what = "an empty text" if found else "no text"
        raise ValueError(
            f"Forgetting: texts={texts!r} holds {what}; give a .txt file with a text in each line, a table with the "
            "column 'text', or a list of texts"
        )
    return found


def _trained_on(data: Any) -> set[str]:
    if not isinstance(data, RowDataModule) or "train" not in data.splits:
        return set()
    return {value for row in data.rows("train") for value in row.values() if isinstance(value, str)}


def text_batches(texts: Sequence[str], model: Any, tokenizer: Any, max_length: int, *, bare: bool) -> Iterator[Batch]:
    """Texts as a model is called with them, padded on the right.

    Args:
        texts: the texts.
        model: a Hugging Face model. The decoder of an encoder-decoder reads the text too.
        tokenizer: its tokenizer.
        max_length: tokens that a text is cut to.
        bare: nothing behind a text, and before it what the tokenizer puts there: as language models read it.
    """
    start = before_text(tokenizer) if bare else []
    for some in _in_batches(texts):
        if bare:
            ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            features = [{"input_ids": (start + row)[:max_length]} for row in ids]
        else:
            found = tokenizer(some, truncation=True, max_length=max_length, verbose=False)
            features = [{"input_ids": row} for row in found["input_ids"]]
        batch = pad_inputs(features, tokenizer)
        if model.config.is_encoder_decoder:
            batch |= {f"decoder_{name}": batch[name] for name in ("input_ids", "attention_mask")}
        yield batch


def image_batches(data: RowDataModule, rows: int) -> Iterator[Batch]:
    """Images of the validation rows as a model is called with them.

    Args:
        data: the run's data module, set up.
        rows: how many, drawn the same way every time.
    """
    features = data.features("validation")
    chosen = sorted(random.Random(0).sample(range(len(features)), min(rows, len(features))))
    for some in _in_batches(chosen):
        yield data.task.collate([features[i] for i in some], data.processing_class, training=False)


def _in_batches(items: Sequence[T]) -> Iterator[list[T]]:
    return (list(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH))
