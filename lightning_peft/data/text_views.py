"""What is seen of texts that are to be trained on: lengths, supervised tokens, what is cut, and examples decoded."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_peft.analysis.data_summary import LOST, Cut, Shown, Spread, TokenCounts, percent
from lightning_peft.data.files import Example
from lightning_peft.data.module import TextDataModule
from lightning_peft.data.parts import LABELS, Part, parts_of, row_lengths, row_supervised
from lightning_peft.data.showing import shown
from lightning_peft.data.views import Look, View, some
from lightning_peft.tasks.padding import IGNORED, pad_token
from lightning_peft.tasks.task import Cutting, Joining

WHOLE = 1_000_000_000
"""Instead of ``max_length``: longer than any text."""

_BEGINNING = 10_000  # rows of a stream


def look_at_texts(data: TextDataModule, sample: int | None) -> Look:
    """What is seen of texts.

    Args:
        data: the data, set up.
        sample: rows of a split that are encoded once more, and that are read of a stream; None takes all, and 10,000
            of a stream.
    """
    encoded: dict[str, _Encoded] = {
        s: _Encoded.of(data, s) for s in ("train", "validation", "test") if s in data.splits
    }
    if data.streaming:
        encoded = {"train": _Encoded.streamed(data, sample or _BEGINNING), **encoded}
    views = {name: _view(data, split, name, sample) for name, split in encoded.items()}
    return Look(
        seen_as=f"cut to {data.max_length} tokens",
        made_by=f"{type(data.tokenizer).__name__}, {len(data.tokenizer):,} tokens",
        views=views,
        notes=[*_padding(data.tokenizer), *(n for name, view in views.items() for n in _lost(data, name, view))],
    )


@dataclass(frozen=True)
class _Encoded:
    """A split's rows and features; of a stream, its beginning."""

    examples: Sequence[Example]
    table: Any
    parts: list[Part]
    joined: bool
    is_streamed: bool = False

    @classmethod
    def of(cls, data: TextDataModule, split: str) -> _Encoded:
        table = data.table(split)
        return cls(data.examples(split), table, parts_of(table), isinstance(data.task, Joining))

    @classmethod
    def streamed(cls, data: TextDataModule, rows: int) -> _Encoded:
        import pyarrow as pa

        examples, features = data.beginning(rows)
        table = pa.Table.from_pylist(features)
        return cls(examples, table, parts_of(table), isinstance(data.task, Joining), is_streamed=True)


def _view(data: TextDataModule, split: _Encoded, name: str, sample: int | None) -> View:
    lengths = {part.name: row_lengths(split.table, part.ids) for part in split.parts}
    marked = [row_supervised(split.table, part) for part in split.parts if part.labels is not None]
    labels, numbers = _targets(data, split)

    def show(row: int) -> Shown:
        (feature,) = split.table.slice(row, 1).to_pylist()
        example = None if split.joined else split.examples[row]
        return shown(feature, split.parts, name, example, data, _whole_length(data, split, row))

    return View(
        examples=split.examples,
        count=len(split.table),
        spreads={
            "length" if len(lengths) == 1 else f"length of {part}": Spread.of(rows, "tokens", data.max_length)
            for part, rows in lengths.items()
        }
        | ({} if numbers is None else {"target": numbers}),
        labels=labels,
        show=show,
        tokens=TokenCounts(
            all=int(sum(n.sum() for n in lengths.values())),
            supervised=int(sum(n.sum() for n in marked)) if marked else None,
            cut=None if split.joined else _cut(data, split, sample),
        ),
        is_streamed=split.is_streamed,
    )


def _targets(data: TextDataModule, view: _Encoded) -> tuple[dict[str, int] | None, Spread | None]:
    """How often each label occurs in the rows, or how a regression's numbers are spread."""
    import pyarrow as pa

    schema = {f.name: f.type for f in view.table.schema}
    kind = schema.get(LABELS)
    if kind is None or view.joined:
        return None, None
    if pa.types.is_floating(kind):
        return None, Spread.of(view.table[LABELS].to_numpy())
    is_text = any(part.labels == LABELS and not part.tags for part in view.parts)
    if is_text:
        return None, None
    columns = {c for shape in data.task.columns for c in shape.targets}
    values = [e.row[c] for e in view.examples if e.row for c in columns if c in e.row]
    flat = Counter(str(v) for value in values for v in (value if isinstance(value, list | tuple) else [value]))
    return dict(flat.most_common()), None


def _cut(data: TextDataModule, view: _Encoded, sample: int | None) -> Cut:
    chosen = some(len(view.table), sample)
    kept = view.table if len(chosen) == len(view.table) else view.table.take(chosen)
    whole = without_cut(data, [view.examples[i] for i in chosen])
    before, supervised = np.zeros(len(chosen), dtype=np.int64), 0
    after, supervised_after = np.zeros(len(chosen), dtype=np.int64), 0
    texts: list[tuple[int, int]] = []  # the tokens of each, and how many of them are supervised
    for part in view.parts:
        lengths = [len(feature[part.ids]) for feature in whole]
        before += lengths
        after += row_lengths(kept, part.ids)
        if part.labels is not None:
            learnt = [int(np.count_nonzero(np.asarray(feature[part.labels]) != IGNORED)) for feature in whole]
            supervised += sum(learnt)
            texts += zip(lengths, learnt, strict=True)
            supervised_after += int(row_supervised(kept, part).sum())
    return Cut(
        looked_at=len(chosen),
        rows=int((before > after).sum()),
        tokens=int(before.sum()),
        tokens_lost=int((before - after).sum()),
        supervised=supervised,
        supervised_lost=supervised - supervised_after,
        enough=_enough(np.array(texts)) if supervised else 0,
    )


def _enough(texts: np.ndarray) -> int:
    """The least length that takes no more than `LOST` of what is supervised, wherever in a text that is."""
    lengths, learnt = texts.T

    def suffices(length: int) -> bool:
        return bool(np.minimum(learnt, np.maximum(lengths - length, 0)).sum() <= LOST * learnt.sum())

    return bisect.bisect_left(range(int(lengths.max())), True, key=suffices)


def without_cut(data: TextDataModule, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What the task would make of rows without the cut.

    Args:
        data: the data, for its tokenizer and its task.
        examples: rows that the task can use.
    """
    warned = getattr(data.tokenizer, "deprecation_warnings", {})  # transformers' mark that it has warned of length
    before = dict(warned)
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    task = data.task.uncut() if isinstance(data.task, Cutting) else data.task
    try:
        return task.encode([e.row or {} for e in examples], data.tokenizer, WHOLE, training=True)
    finally:
        warned.clear()
        warned.update(before)


def _whole_length(data: TextDataModule, view: _Encoded, row: int) -> int | None:
    if view.joined:
        return None
    (feature,) = without_cut(data, [view.examples[row]])
    return sum(len(feature[part.ids]) for part in view.parts)


def _padding(tokenizer: Any) -> list[str]:
    if tokenizer.pad_token_id is not None:
        return []
    token = tokenizer.convert_ids_to_tokens(pad_token(tokenizer))
    return [f"The tokenizer has no padding token: batches are padded with {token!r}, which is masked."]


def _lost(data: TextDataModule, name: str, view: View) -> list[str]:
    cut = None if view.tokens is None else view.tokens.cut
    if cut is None or cut.supervised_lost <= LOST * cut.supervised:
        return []
    share = percent(cut.supervised_lost, cut.supervised)
    limits = f"data.max_length={data.max_length}" + (" and the task's own" if isinstance(data.task, Cutting) else "")
    return [f"{name}: the cut to {limits} loses {share} of what is learnt."]
