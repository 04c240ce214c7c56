"""Reading files that may be cut short, damaged or of another kind: the error names the file and what is wrong."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch

from lightning_peft.core.problems import an

_NOTHING: Mapping[str, type] = MappingProxyType({})


def read_json(path: Path, needed: Mapping[str, type] = _NOTHING) -> dict[str, Any]:
    """A file's JSON object.

    Args:
        path: the file.
        needed: the keys that it must have, and the types of what stands there.

    Raises:
        ValueError: if it is no JSON, no object, or lacks a key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, it may be cut short: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {an(type(found).__name__)}")
    wrong = [k for k, kind in needed.items() if not isinstance(found.get(k), kind)]
    if wrong:
        raise ValueError(f"{path} has no {', '.join(wrong)}, or something else there; save the adapter again")
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ``with`` block in which an error about a file's content names the file.

    Args:
        path: the file.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint on the CPU; its tensors are read from the disk when they are used.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or holds more than tensors and plain values.
    """
    if not path.is_file():
        what = "is a folder, but a checkpoint is a file" if path.is_dir() else "is no file"
        raise FileNotFoundError(f"{path} {what}; pass the path of a .ckpt")
    # torch's own errors about a file without the index at its end name neither the file nor the cause
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is no checkpoint, or one that is cut short; copy or save it again")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"an object of {foreign.group(1)}" if foreign else "more"
        raise ValueError(
            f"{path} holds {what}, but only tensors and plain values are opened; keep it out of hyperparameters and "
            "callbacks' states, or allow it by torch.serialization.safe_globals if you trust the file"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be damaged: {error}") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    return found
