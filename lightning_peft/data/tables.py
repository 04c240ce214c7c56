"""Rows of `datasets`' tables: classes by their names, and images as what is read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from lightning_peft.data.files import Example
from lightning_peft.data.images import ImageFile, ImageInTable, StoredImage


def from_rows(rows: Any, name: str) -> Iterator[Example]:
    """The rows of a table, held without the bytes of its images.

    Args:
        rows: a `datasets.Dataset`, or one that is streamed, whose images stay as they are.
        name: of the table; a row's place is its number in it.

    Yields:
        The rows in order.
    """
    import datasets

    # a data set that was saved as arrays or tensors for another library comes back as those
    rows = rows.with_format(None)
    features = rows.features or {}
    named = {column: say for column, kind in features.items() if (say := _names(kind)) is not None}
    for column, kind in features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    seen = [] if isinstance(rows, datasets.IterableDataset) else [c for c, kind in features.items() if _is_image(kind)]
    images = {column: _images(rows, column, name) for column in seen}
    others = [column for column in features if column not in images]
    # a table without columns has no rows either
    plain: Any = (rows.select_columns(others) if others else repeat({}, len(rows))) if images else rows
    for number, row in enumerate(plain, start=1):
        found = {column: named[column](value) if column in named else value for column, value in row.items()}
        yield Example(found | {column: next(some) for column, some in images.items()}, f"{name}, row {number}")


def _is_image(kind: Any) -> bool:
    """Whether a column holds bytes, by themselves or beside the path that they are from."""
    import datasets

    if isinstance(kind, dict):
        return kind.keys() == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary")


def _images(rows: Any, column: str, name: str) -> Iterator[StoredImage | None]:
    """The images of a column, in order; None where a row has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    alone = rows.select_columns([column])
    number = 0
    for batch in alone.with_format("arrow").iter(1000):
        values = batch[column]
        beside = pa.types.is_struct(values.type)
        there = pc.is_valid(pc.struct_field(values, "bytes") if beside else values).to_pylist()
        paths = pc.struct_field(values, "path").to_pylist() if beside else [None] * len(there)
        for has_bytes, path in zip(there, paths, strict=True):
            if has_bytes:
                yield ImageInTable(alone, number, column, path or f"{name}, row {number + 1}")
            else:
                yield None if path is None else ImageFile(Path(path))
            number += 1


def _names(kind: Any) -> Callable[[Any], Any] | None:
    """What turns a column's class numbers into names, or None where it holds none."""
    import datasets

    if isinstance(kind, datasets.ClassLabel):
        # some tables mark what nobody has labelled with -1
        return lambda value: None if value is None or value < 0 else kind.int2str(value)
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    of_one = None if inner is None else _names(inner)
    if of_one is None:
        return None
    return lambda values: None if values is None else [of_one(value) for value in values]
