"""Whether a model knows the tokens that it is to read, and the one that fills its batches up."""

from __future__ import annotations

from typing import Any

from lightning_peft.data.module import TextDataModule
from lightning_peft.data.parts import largest_id
from lightning_peft.tasks.padding import pad_token


def agree_on_tokens(data: TextDataModule, model: Any) -> None:
    """Refuses token ids that the model has no embedding for, and tells it what batches are padded with.

    A classifier on a decoder finds a text's last token by the padding token: one that is not the tokenizer's own
    would have it read the padding.

    Args:
        data: the data, set up.
        model: the Hugging Face model.

    Raises:
        ValueError: if there is such an id; the next step would fail with an index out of range, or on a GPU without
            any sentence.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None or data.tokenizer is None:
        return
    pad = pad_token(data.tokenizer)
    if max(pad, len(data.tokenizer) - 1) >= rows:
        highest = max(pad, _largest_id(data))
        if highest >= rows:
            token = data.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"the data has the token id {highest} ({token!r}), but the model's embedding has {rows} rows: give the "
                "model's own tokenizer (model.tokenizer=...), or a model whose embedding was enlarged for it "
                "(model.resize_token_embeddings(len(tokenizer)), then save both)"
            )
    if getattr(model.config, "pad_token_id", pad) != pad:
        model.config.pad_token_id = pad


def _largest_id(data: TextDataModule) -> int:
    import pyarrow as pa

    tables = [data.table(split) for split in data.splits]
    if data.streaming:
        tables.append(pa.Table.from_pylist(data.beginning()[1]))
    return max((largest_id(table) for table in tables), default=-1)
