"""Files and folders that appear as a whole or not at all, also where the process is killed or the power fails."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_OLD = 24 * 3600.0  # seconds after which what a killed process left is nobody's: no file takes as long to write


@contextmanager
def written_whole(path: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files lie at ``path`` when the block ends well, and not at all else.

    A new folder appears at once. Into one that exists files go one after the other, so those by which readers tell what
    the folder is go last: killed in between, it is nothing yet or whole.

    Args:
        path: the folder; it may exist.
        last: the names of those files, in the order in which they go.

    Yields:
        The folder to write into, on the same disk.
    """
    scratch = _scratch(path if path.is_dir() else path.parent, path.name)
    scratch.mkdir()
    try:
        yield scratch
        for entry in (*scratch.rglob("*"), scratch):
            _flush(entry)
        if path.exists():
            _move(scratch, path, last)
        else:
            scratch.rename(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: Path, path: Path, last: Sequence[str]) -> None:
    names = [p.relative_to(scratch) for p in scratch.rglob("*") if not p.is_dir()]
    for name in sorted(names, key=lambda n: (last.index(str(n)) + 1 if str(n) in last else 0, n)):
        if str(name) in last:
            _flush(path)  # what it stands for is there before it
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / name, path / name)
    _flush(path)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when the block ends well, and is gone else.

    Whoever reads ``path`` meanwhile gets the old file or the new one.

    Args:
        path: the file; it may exist.

    Yields:
        The file to write.
    """
    scratch = _scratch(path.parent, path.name)
    try:
        yield scratch
        _flush(scratch)
        scratch.replace(path)
        _flush(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes plain values in an order that does not depend on how they were put together.

    Args:
        path: the file.
        content: the values.
    """
    with written_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scratch(folder: Path, name: str) -> Path:
    """A place that no other process or thread writes to; what killed ones left there goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial", entry.name):
            with suppress(OSError):  # which another process may be about to remove
                if time.time() - entry.stat().st_mtime > _OLD:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return folder / f".{name}.{secrets.token_hex(4)}.partial"


def _flush(path: Path) -> None:
    """Has a file or a folder's list of files on the disk, so that no later rename is there without it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network drives flush no folders
            raise
    finally:
        os.close(handle)
