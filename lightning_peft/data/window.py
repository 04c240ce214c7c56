"""Whether texts fit into a model's window: the positions that it has."""

from __future__ import annotations

import warnings
from typing import Any

from torch.nn import Embedding

from lightning_peft.data.encoding import LENGTH
from lightning_peft.data.module import TextDataModule

_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def refuse_long_texts(data: TextDataModule, model: Any) -> None:
    """Refuses texts with more tokens than a model has learnt positions for; says so of positions that are computed.

    Args:
        data: the data, set up; of a stream its beginning is looked at.
        model: the Hugging Face model.

    Raises:
        ValueError: if there is such a text: a step would fail with an index out of range, or on a GPU without any
            sentence.
    """
    learnt, made_for = _learnt_positions(model), _computed_positions(model)
    limit = made_for if learnt is None else learnt
    longest = _longest(data) if limit is not None and limit < data.max_length else 0
    if limit is None or longest <= limit:
        return
    said = f"the longest text has {longest:,} tokens, but the model"
    if learnt is not None:
        raise ValueError(f"{said} has {limit:,} positions; set data.max_length={limit} or less")
    warnings.warn(f"{said} was made for {limit:,} (max_position_embeddings); data.max_length cuts texts", stacklevel=2)


def _learnt_positions(model: Any) -> int | None:
    """The rows of a table of positions, without those before the first text token's, such as RoBERTa's two."""
    named = model.named_modules() if hasattr(model, "named_modules") else ()
    tables = [m for n, m in named if n.rpartition(".")[2] in _POSITIONS and isinstance(m, Embedding)]
    said = getattr(_config(model), "max_position_embeddings", None)
    found = [t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables]
    return min([*found, *([said] if said else [])]) if found else None


def _computed_positions(model: Any) -> int | None:
    """What a model with rotary positions was trained with, unless it stretches them itself."""
    config = _config(model)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", "default") != "default":
        return None
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def _config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _longest(data: TextDataModule) -> int:
    lengths = [max(data.table(split)[LENGTH].to_pylist(), default=0) for split in data.splits]
    if data.streaming:
        lengths.append(max((f[LENGTH] for f in data.beginning()[1]), default=0))
    return max(lengths, default=0)
