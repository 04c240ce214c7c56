"""A TextDataModule's rows and features as a `DataSummary`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.analysis.data_summary import Cut, DataSummary, SplitSummary, Spread, listed, percent
from lightning_peft.data.files import Example
from lightning_peft.data.module import TextDataModule
from lightning_peft.data.parts import LABELS, Part, parts_of, row_lengths, row_supervised
from lightning_peft.data.showing import shown
from lightning_peft.data.splits import inputs_key
from lightning_peft.tasks.padding import IGNORED, pad_token
from lightning_peft.tasks.task import Joining

WHOLE = 1_000_000_000
"""Instead of ``max_length``: longer than any text."""

_LOST = 0.05  # of the supervised tokens: more is worth a sentence


def summarise(data: TextDataModule, *, examples: int = 2, sample: int | None = 1000) -> DataSummary:
    """Looks at the data that a model is to be trained on.

    Lengths, counts, labels and duplicates are those of all rows. What ``max_length`` cuts off takes encoding rows once
    more, so it is measured on a sample, whose size the summary says.

    Args:
        data: the data, after its ``setup("fit")``.
        examples: how many training rows to show, chosen at random, the same every time.
        sample: rows of a split that are encoded once more, and that are read of a stream; None takes all, and 10,000
            of a stream.
    """
    splits: list[str] = [s for s in ("train", "validation", "test") if s in data.splits]
    views = {s: _View.of(data, s) for s in splits}
    if data.streaming:
        views = {"train": _View.streamed(data, sample or 10_000), **views}
    seen = {name: _Seen(view.examples, data.inputs) for name, view in views.items()}
    found = {name: _summary(data, view, name, seen, sample) for name, view in views.items()}
    first = next(iter(views))
    chosen = _some(len(views[first].table), examples)
    return DataSummary(
        task=str(data.task.to_config()["name"]),
        origin=_spoken(data.origin("train")),
        tokenizer=f"{type(data.tokenizer).__name__}, {len(data.tokenizer):,} tokens",
        max_length=data.max_length,
        splits=found,
        examples=tuple(
            shown(
                views[first].table.slice(i, 1).to_pylist()[0],
                views[first].parts,
                first,
                None if views[first].joined else views[first].examples[i],
                data,
                _whole_length(data, views[first], i),
            )
            for i in chosen
        ),
        notes=tuple(_notes(data, found)),
    )


@dataclass(frozen=True)
class _View:
    """A split's rows and features; of a stream, its beginning."""

    examples: Sequence[Example]
    table: Any
    parts: list[Part]
    joined: bool
    is_streamed: bool = False

    @classmethod
    def of(cls, data: TextDataModule, split: str) -> _View:
        table = data.features(split).with_format("arrow")[:]
        return cls(data.examples(split), table, parts_of(table), isinstance(data.task, Joining))

    @classmethod
    def streamed(cls, data: TextDataModule, rows: int) -> _View:
        import pyarrow as pa

        examples, features = data.beginning(rows)
        table = pa.Table.from_pylist(features)
        return cls(examples, table, parts_of(table), isinstance(data.task, Joining), is_streamed=True)


class _Seen:
    """By what a row is known again: all of it, and its inputs."""

    def __init__(self, examples: Iterable[Example], inputs: Sequence[str]) -> None:
        self.inputs = inputs
        self.rows: set[int] = set()
        self.prompts: set[int] = set()
        self.again = self.prompts_again = 0
        for example in examples:
            row, prompt = self.keys(example)
            self.again += row in self.rows
            self.prompts_again += row not in self.rows and prompt in self.prompts
            self.rows.add(row)
            self.prompts.add(prompt)

    def keys(self, example: Example) -> tuple[int, int]:
        columns = sorted(c for c in (example.row or {}) if c != "id")
        return hash(inputs_key(example, columns)), hash(inputs_key(example, self.inputs))


def _summary(data: TextDataModule, view: _View, name: str, seen: dict[str, _Seen], sample: int | None) -> SplitSummary:
    training = None if name == "train" else seen.get("train")
    keys = [] if training is None else [training.keys(example) for example in view.examples]
    twice = [row in training.rows for row, _ in keys] if training else []
    similar = [prompt in training.prompts for _, prompt in keys] if training else []
    lengths = {part.name: row_lengths(view.table, part.ids) for part in view.parts}
    marked = [row_supervised(view.table, part) for part in view.parts if part.labels is not None]
    labels, numbers = _targets(data, view)
    return SplitSummary(
        examples=len(view.table),
        rows=len(view.examples),
        streamed=view.is_streamed,
        tokens=int(sum(n.sum() for n in lengths.values())),
        supervised=int(sum(n.sum() for n in marked)) if marked else None,
        lengths={name: Spread.of(numbers) for name, numbers in lengths.items()},
        cut=None if view.joined else _cut(data, view, sample),
        labels=labels,
        numbers=numbers,
        duplicates=seen[name].again,
        same_inputs=seen[name].prompts_again,
        in_training=sum(twice),
        inputs_in_training=sum(s and not t for s, t in zip(similar, twice, strict=True)),
    )


def _targets(data: TextDataModule, view: _View) -> tuple[dict[str, int] | None, Spread | None]:
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


def _cut(data: TextDataModule, view: _View, sample: int | None) -> Cut:
    some = _some(len(view.table), sample)
    kept = view.table if len(some) == len(view.table) else view.table.take(some)
    whole = _whole(data, [view.examples[i] for i in some])
    before, supervised = np.zeros(len(some), dtype=np.int64), 0
    after, supervised_after = np.zeros(len(some), dtype=np.int64), 0
    for part in view.parts:
        before += [len(feature[part.ids]) for feature in whole]
        after += row_lengths(kept, part.ids)
        if part.labels is not None:
            supervised += sum(int(np.count_nonzero(np.asarray(feature[part.labels]) != IGNORED)) for feature in whole)
            supervised_after += int(row_supervised(kept, part).sum())
    return Cut(
        looked_at=len(some),
        rows=int((before > after).sum()),
        tokens=int(before.sum()),
        tokens_lost=int((before - after).sum()),
        supervised=supervised,
        supervised_lost=supervised - supervised_after,
    )


def _whole(data: TextDataModule, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What the task would make of rows without the cut."""
    warned = getattr(data.tokenizer, "deprecation_warnings", {})  # transformers' mark that it has warned of length
    before = dict(warned)
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    try:
        return data.task.encode([e.row or {} for e in examples], data.tokenizer, WHOLE, training=True)
    finally:
        warned.clear()
        warned.update(before)


def _whole_length(data: TextDataModule, view: _View, row: int) -> int | None:
    if view.joined:
        return None
    (feature,) = _whole(data, [view.examples[row]])
    return sum(len(feature[part.ids]) for part in view.parts)


def _some(count: int, wanted: int | None) -> list[int]:
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(0).sample(range(count), wanted))


def _spoken(origin: Any) -> str:
    names = [origin] if isinstance(origin, str | Path) else list(origin)
    return str(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _notes(data: TextDataModule, splits: dict[str, SplitSummary]) -> list[str]:
    notes = []
    tokenizer = data.tokenizer
    if tokenizer.pad_token_id is None:
        token = tokenizer.convert_ids_to_tokens(pad_token(tokenizer))
        notes.append(f"The tokenizer has no padding token: batches are padded with {token!r}, which is masked.")
    train = splits.get("train")
    for name, split in splits.items():
        lost = 0 if split.cut is None else split.cut.supervised_lost
        if split.cut is not None and lost > _LOST * split.cut.supervised:
            share = percent(lost, split.cut.supervised)
            notes.append(f"{name}: the cut to data.max_length={data.max_length} loses {share} of what is learnt.")
        if split.in_training:
            share = percent(split.in_training, split.rows)
            notes.append(f"{name}: {share} of its rows are trained on too, so its metrics flatter the model.")
        if train is not None and train.labels is not None and split.labels is not None:
            unseen = [label for label in split.labels if label not in train.labels]
            if unseen:
                notes.append(f"{name}: no training row has the label{'s' * (len(unseen) > 1)} {listed(unseen)}.")
    return notes
