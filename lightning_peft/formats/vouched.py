"""How much of what a checkpoint says its bytes vouch for: repeated values and expanded tensors take none in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SLACK = 2**26
"""Bytes that tensors may take beyond their file when they are written out, such as an expanded mask: 64 MiB."""


def refuse_unvouched(path: Path, found: Any) -> None:
    """Refuses values that are far more than their file once somebody walks through them, or writes them out.

    Args:
        path: the checkpoint.
        found: what was read from it.

    Raises:
        ValueError: if one contains itself, or they repeat, or expand, beyond the file's length.
        RecursionError: if they are nested too deeply.
    """
    size = path.stat().st_size
    tensors: list[Tensor] = []
    if _unfolded(found, {}, tensors) > size:
        raise ValueError(f"{path} repeats its values so often that they are more than its {size:,} bytes")
    taken: dict[int, int] = {}
    for tensor in filter(_is_dense, tensors):
        storage = tensor.untyped_storage()
        written = max(storage.nbytes(), tensor.numel() * tensor.element_size())
        taken[storage.data_ptr()] = max(written, taken.get(storage.data_ptr(), 0))
    if sum(taken.values()) > size + _SLACK:
        raise ValueError(
            f"{path} has {size:,} bytes, but its tensors ask for {sum(taken.values()):,}: they repeat a few numbers"
        )


def stored_numbers(state: dict[str, Any]) -> int:
    """How many numbers the tensors of a state dict have in the file, where tensors that share them have them once.

    Args:
        state: the state dict, as it was read.
    """
    found: dict[int, int] = {}
    for tensor in state.values():
        if isinstance(tensor, Tensor) and _is_dense(tensor):
            storage = tensor.untyped_storage()
            numbers = storage.nbytes() // tensor.element_size()
            found[storage.data_ptr()] = min(numbers, found.get(storage.data_ptr(), numbers))
    return sum(found.values())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _unfolded(value: Any, seen: dict[int, int], tensors: list[Tensor]) -> int:
    """How many values there are, with those that stand in several places counted in each."""
    if isinstance(value, Tensor):
        tensors.append(value)
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    count = seen.setdefault(id(value), 0)
    if count < 0:
        raise ValueError("a value in it contains itself")
    if count == 0:
        seen[id(value)] = -1
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        count = seen[id(value)] = 1 + sum(_unfolded(v, seen, tensors) for v in inner)
    return count
