"""Which of a row's features are sequences of tokens, and what of them is learnt, told by the columns' names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_peft.tasks.padding import IGNORED

IDS = "input_ids"
LABELS = "labels"


@dataclass(frozen=True)
class Part:
    """A sequence of tokens in each row's features.

    Attributes:
        name: what to call it: what stands before ``input_ids`` in the column's name, or ``"target"``.
        ids: the column with the tokens.
        labels: the column that says which of them are learnt; None where none is.
        tags: whether that column holds the tokens' classes instead of the tokens.
    """

    name: str
    ids: str
    labels: str | None = None
    tags: bool = False


def parts_of(table: Any) -> list[Part]:
    """The sequences of tokens in features.

    A column ``<name>_input_ids`` is one. Its ``<name>_labels``, where they are as long in every row, say what is
    learnt; labels that are not are a sequence of their own, as the target of an encoder-decoder is.

    Args:
        table: the features, a ``pyarrow.Table``.
    """
    import pyarrow as pa

    lists = {f.name: f.type.value_type for f in table.schema if pa.types.is_list(f.type)}
    found = []
    for column in lists:
        if not column.endswith(IDS):
            continue
        prefix = column.removesuffix(IDS)
        labels = f"{prefix}{LABELS}"
        name = prefix.rstrip("_") or "input"
        if not pa.types.is_integer(lists.get(labels, pa.null())):
            found.append(Part(name, column))
        elif np.array_equal(row_lengths(table, column), row_lengths(table, labels)):
            found.append(Part(name, column, labels, tags=_differ(table, column, labels)))
        else:
            target = f"{prefix}target"
            found += [Part(name, column), Part(target, labels, labels)]
    return found


def row_lengths(table: Any, column: str) -> Any:
    """How many entries each row has: ``(rows,)``.

    Args:
        table: the features.
        column: one of lists.
    """
    import pyarrow.compute as pc

    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def row_supervised(table: Any, part: Part) -> Any:
    """How many tokens of each row are learnt: ``(rows,)``.

    Args:
        table: the features.
        part: one of its sequences, with labels.
    """
    assert part.labels is not None
    counts = []
    for lengths, values in _batches(table, part.labels):
        before = np.concatenate([[0], np.cumsum(values != IGNORED)])
        ends = np.cumsum(lengths)
        counts.append(before[ends] - before[ends - lengths])
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def largest_id(table: Any) -> int:
    """The largest token id of all sequences; -1 where there is none.

    Args:
        table: the features.
    """
    columns = {column for p in parts_of(table) for column in (p.ids, None if p.tags else p.labels) if column}
    values = (values for column in columns for _, values in _batches(table, column))
    return max((int(v.max()) for v in values if len(v)), default=-1)


def _differ(table: Any, ids: str, labels: str) -> bool:
    """Whether what is learnt at a place is something else than the token that stands there."""
    pairs = zip(_batches(table, ids), _batches(table, labels), strict=True)
    return any(bool(((wanted != IGNORED) & (wanted != there)).any()) for (_, there), (_, wanted) in pairs)


def _batches(table: Any, column: str) -> Iterator[tuple[Any, Any]]:
    """Lengths and joined values, batch by batch: data larger than memory stays on disk."""
    for batch in table.select([column]).to_batches():
        rows = batch.column(0)
        yield rows.value_lengths().to_numpy(), rows.flatten().to_numpy(zero_copy_only=False)
