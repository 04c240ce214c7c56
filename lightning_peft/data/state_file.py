"""Hidden states of rows in one memory-mapped file, found by what the rows hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_peft.core.options import misfits
from lightning_peft.formats.writing import written_file

_KEPT = "frozen_layers.bin"
_IN_INDEX: dict[str, Any] = {
    "made_by": dict[str, Any],
    "dtype": str,
    "shape": list[int],
    "places": dict[str, list[int]],
}


class StateFile:
    """Rows of hidden states on disk, bounded by a size.

    The file is as large as it may become, and takes the room on disk that is written to. Its name is its own: several
    runs may share a folder.

    Args:
        folder: where it lies.
        limit: bytes; never more than half of what is free there.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(".bin", "frozen_layers-", folder)
        os.close(handle)
        self.path = Path(path)
        # a map of a file that the disk has no room for ends the process without a word
        self.limit = min(limit, shutil.disk_usage(folder).free // 2)
        self.used = 0
        self.full = False
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self._places: dict[str, tuple[int, int]] = {}
        self._bytes: Any = np.memmap(self.path, np.uint8, "w+", shape=(self.limit,))

    def __len__(self) -> int:
        return len(self._places)

    def holds(self, keys: list[str]) -> bool:
        """Whether all of these rows are there."""
        return all(key in self._places for key in keys)

    def put(self, key: str, states: Tensor) -> None:
        """Keeps a row, unless it is there or there is no room.

        Args:
            key: what the row is found by.
            states: ``(tokens, ...)``, of the same shape behind the tokens and the same dtype as all others.
        """
        if key in self._places:
            return
        raw = states.contiguous().view(torch.uint8).reshape(-1).cpu().numpy()
        if self.used + len(raw) > self.limit:
            self.full = True
            return
        self.shape, self.dtype = tuple(states.shape[1:]), states.dtype
        self._bytes[self.used : self.used + len(raw)] = raw
        self._places[key] = (self.used, len(raw))
        self.used += len(raw)

    def get(self, keys: list[str]) -> Tensor:
        """The states of rows one behind the other, ``(tokens of all, ...)``."""
        assert self.dtype is not None
        parts = [self._bytes[start : start + length] for start, length in map(self._places.__getitem__, keys)]
        whole = torch.from_numpy(np.concatenate(parts))
        return whole.view(self.dtype).view(-1, *self.shape)

    def delete(self) -> None:
        """Removes the file."""
        self._bytes = None
        self._places.clear()
        self.path.unlink(missing_ok=True)

    def keep(self, made_by: dict[str, Any]) -> None:
        """Cuts the file to what it holds, for another run to find in this folder; one that was kept before goes.

        Args:
            made_by: plain values that have to be the same in that run.
        """
        self._bytes.flush()
        self._bytes = None
        with self.path.open("r+b") as file:
            file.truncate(self.used)
        dtype = str(self.dtype).removeprefix("torch.")
        index = {"made_by": made_by, "dtype": dtype, "shape": self.shape, "places": self._places}
        kept = self.path.with_name(_KEPT)
        kept.with_suffix(".json").unlink(missing_ok=True)
        self.path.replace(kept)
        with written_file(kept.with_suffix(".json")) as scratch:
            scratch.write_text(json.dumps(index))

    @classmethod
    def found(cls, folder: Path, limit: int, made_by: dict[str, Any]) -> StateFile:
        """What an earlier run kept in a folder, if that was made in the same way; else an empty file.

        One that is damaged stays where it is until another is kept, and a warning says so.

        Args:
            folder: where.
            limit: bytes.
            made_by: as `keep` was told.
        """
        new = cls(folder, limit)
        kept = folder / _KEPT
        try:
            index = _index(kept.with_suffix(".json").read_text())
            size = kept.stat().st_size
            if index["made_by"] != made_by or size > new.limit:
                return new
            dtype, places = _understood(index, size)
            # who has taken it away has it alone
            kept.replace(new.path)
            kept.with_suffix(".json").unlink(missing_ok=True)
        except FileNotFoundError:
            return new
        except ValueError as error:
            warnings.warn(f"{kept} is computed anew, since it cannot be read: {error}", stacklevel=2)
            return new
        new.used = size
        with new.path.open("r+b") as file:
            file.truncate(new.limit)
        new.shape, new.dtype, new._places = tuple(index["shape"]), dtype, places
        new._bytes = np.memmap(new.path, np.uint8, "r+", shape=(new.limit,))
        return new


def _index(text: str) -> dict[str, Any]:
    found: Any = json.loads(text)
    wrong = misfits(found, _IN_INDEX) if isinstance(found, dict) else list(_IN_INDEX)
    if wrong:
        raise ValueError(f"its index has no {', '.join(wrong)}, or something else there")
    index: dict[str, Any] = found
    return index


def _understood(index: dict[str, Any], size: int) -> tuple[torch.dtype, dict[str, tuple[int, int]]]:
    """What an index says of a file of that many bytes.

    Raises:
        ValueError: if it is not of that file.
    """
    dtype, places = getattr(torch, index["dtype"], None), index["places"]
    if not isinstance(dtype, torch.dtype) or min([1, *index["shape"]]) < 1:
        raise ValueError(f"its rows are {index['dtype']} of {index['shape']}")
    row = math.prod(index["shape"]) * dtype.itemsize
    if any(len(p) != 2 or min(p) < 0 or sum(p) > size or p[1] % row for p in places.values()):
        raise ValueError(f"its rows lie outside of its {size:,} bytes, or end within a token")
    return dtype, {key: (start, length) for key, (start, length) in places.items()}


def row_keys(inputs: dict[str, Tensor], mask: Tensor | None) -> list[str]:
    """A key for each row of a batch, the same in whatever batch it comes.

    Args:
        inputs: tensors with the rows along their first dimension.
        mask: ``(batch, tokens)``, 0 where a row is padded, or None.
    """
    count = len(next(iter(inputs.values())))
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(count)]
    rows = None if mask is None else mask.bool().cpu()
    for name in sorted(inputs):
        values = inputs[name].detach().cpu()
        per_token = rows is not None and values.shape[:2] == rows.shape
        for i, found in enumerate(hashes):
            row = values[i][rows[i]] if rows is not None and per_token else values[i]
            found.update(f"{name}{tuple(row.shape)}{row.dtype}".encode())
            found.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    if rows is not None:  # what is masked before a token moves its position
        for found, row in zip(hashes, rows, strict=True):
            found.update(str(row.nonzero()[:, 0].tolist()).encode())
    return [found.hexdigest() for found in hashes]
