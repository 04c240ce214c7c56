"""Attention over rows that lie one behind the other: each row by itself, where a mask would rule out all else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

BY_ROW = "sdpa_by_row"
"""transformers' SDPA attention, but over each row alone in a forward that says where rows are."""

_unmasked: ContextVar[int] = ContextVar("_unmasked", default=0)


def take_rows(model: Any) -> bool:
    """Lets a model's attention take rows one by one, if it is transformers' SDPA, on a CPU, over all of a row.

    Elsewhere it was not measured: GPUs have flash attention for it. A forward that says nothing of rows stays what
    it was, and so does a window that slides, which this attention may not be told of.

    Args:
        model: a Hugging Face model.

    Returns:
        Whether it does; `leave_rows` takes it back.
    """
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_window", "window_size")]
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in ("sdpa", BY_ROW) or not on_cpu or kinds != {"full_attention"} or any(windows):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BY_ROW, _attend)
    AttentionMaskInterface.register(BY_ROW, _mask)
    config._attn_implementation = BY_ROW
    return True


def has_rows(model: Any) -> bool:
    """Whether a model's attention takes rows one by one.

    Args:
        model: any.
    """
    return hasattr(model, "config") and getattr(text_config(model), "_attn_implementation", None) == BY_ROW


def leave_rows(model: Any) -> None:
    """Gives a model its SDPA attention back, if its attention takes rows.

    Args:
        model: any.
    """
    if has_rows(model):
        text_config(model)._attn_implementation = "sdpa"


def text_config(model: Any) -> Any:
    """What a model's configuration says of its language model.

    Args:
        model: a Hugging Face model.
    """
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def without_masks(tokens: int) -> Iterator[None]:
    """A block whose forwards make no mask over this many tokens, since they say where rows are (``rows``)."""
    token = _unmasked.set(tokens)
    try:
        yield
    finally:
        _unmasked.reset(token)


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    # a method may run the model on other tokens within such a forward
    if batch_size == 1 and q_length == kv_length == _unmasked.get():
        return None
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, *args, **options)
    return mask


def _attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``(batch, heads, tokens, size)`` -> ``(batch, tokens, heads, size)``, of rows of these lengths in tokens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(*part: Tensor, mask: Tensor | None = None) -> Tensor:
        attended: Tensor = sdpa_attention_forward(module, *part, mask, **options)[0]
        return attended

    if rows is None or sum(rows) != key.shape[2]:
        return attend(query, key, value, mask=attention_mask), None
    parts = zip(*(torch.split(x, list(rows), 2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part) for part in parts], 1), None
