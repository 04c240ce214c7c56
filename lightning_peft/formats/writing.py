"""Files and folders that appear as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into, whose files appear there when the block ends well, and not at all else.

    Args:
        path: the folder; it may exist.

    Yields:
        The folder to write into.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if path.exists():
            for file in scratch.iterdir():
                os.replace(file, path / file.name)
        else:
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when the block ends well, and is gone else.

    Whoever reads ``path`` meanwhile gets the old file or the new one.

    Args:
        path: the file; it may exist.

    Yields:
        The file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
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
