"""A data module's rows and what is made of them as a `DataSummary`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.analysis.data_summary import DataSummary, SplitSummary, listed, percent
from lightning_peft.data.files import Example
from lightning_peft.data.rows import RowDataModule
from lightning_peft.data.splits import inputs_key
from lightning_peft.data.views import View, some


def summarise(data: RowDataModule, *, examples: int = 2, sample: int | None = 1000) -> DataSummary:
    """Looks at the data that a model is to be trained on.

    Measures, counts, labels and duplicates are those of all rows. What ``max_length`` cuts off a text takes encoding
    rows once more, so it is measured on a sample, whose size the summary says.

    Args:
        data: the data, after its ``setup("fit")``.
        examples: how many training rows to show, chosen at random, the same every time.
        sample: rows of a split that are encoded once more, and that are read of a stream; None takes all, and 10,000
            of a stream.
    """
    look = data.look(sample)
    seen = {name: _Seen(view.examples, data.inputs) for name, view in look.views.items()}
    found = {name: _summary(view, name, seen) for name, view in look.views.items()}
    first = next(iter(look.views.values()))
    return DataSummary(
        task=str(data.task.to_config()["name"]),
        origin=_spoken(data.origin("train")),
        seen_as=look.seen_as,
        made_by=look.made_by,
        splits=found,
        examples=tuple(first.show(i) for i in some(first.count, examples)),
        notes=(*look.notes, *_notes(found)),
    )


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


def _summary(view: View, name: str, seen: dict[str, _Seen]) -> SplitSummary:
    training = None if name == "train" else seen.get("train")
    keys = [] if training is None else [training.keys(example) for example in view.examples]
    twice = [row in training.rows for row, _ in keys] if training else []
    similar = [prompt in training.prompts for _, prompt in keys] if training else []
    return SplitSummary(
        examples=view.count,
        rows=len(view.examples),
        streamed=view.is_streamed,
        spreads=view.spreads,
        tokens=view.tokens,
        labels=view.labels,
        duplicates=seen[name].again,
        same_inputs=seen[name].prompts_again,
        in_training=sum(twice),
        inputs_in_training=sum(s and not t for s, t in zip(similar, twice, strict=True)),
    )


def _spoken(origin: Any) -> str:
    names = [origin] if isinstance(origin, str | Path) else list(origin)
    return str(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _notes(splits: dict[str, SplitSummary]) -> list[str]:
    notes = []
    train = splits.get("train")
    for name, split in splits.items():
        if split.in_training:
            share = percent(split.in_training, split.rows)
            notes.append(f"{name}: {share} of its rows are trained on too, so its metrics flatter the model.")
        if train is not None and train.labels is not None and split.labels is not None:
            unseen = [label for label in split.labels if label not in train.labels]
            if unseen:
                notes.append(f"{name}: no training row has the label{'s' * (len(unseen) > 1)} {listed(unseen)}.")
    return notes
