"""A row's features decoded, in pieces that are learnt and pieces that are not."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from lightning_peft.analysis.data_summary import Piece, Shown, ShownText
from lightning_peft.data.files import Example
from lightning_peft.data.module import TextDataModule
from lightning_peft.data.parts import Part
from lightning_peft.tasks.padding import IGNORED


def shown(
    feature: dict[str, Any],
    parts: list[Part],
    split: str,
    example: Example | None,
    data: TextDataModule,
    whole: int | None,
) -> Shown:
    """One example as the model sees it.

    Args:
        feature: its features.
        parts: its sequences of tokens.
        split: where it is from.
        example: its row; None where a task joins rows.
        data: the data, for its tokenizer and its task's labels.
        whole: how many tokens it has without the cut.
    """
    row = {} if example is None else example.row or {}
    marked = [part for part in parts if part.labels is not None]
    learnt = {c for shape in data.task.columns for c in shape.targets if c in row}
    return Shown(
        split=split,
        place="" if example is None else example.place,
        targets={} if marked else {c: str(row[c]) for c in sorted(learnt)},
        text=ShownText(
            sequences={part.name: _pieces(feature, part, data) for part in parts},
            tokens=sum(len(feature[part.ids]) for part in parts),
            supervised=sum(sum(n != IGNORED for n in feature[str(part.labels)]) for part in marked) if marked else None,
            whole=whole,
        ),
    )


def _pieces(feature: dict[str, Any], part: Part, data: TextDataModule) -> tuple[Piece, ...]:
    ids = feature[part.ids]
    labels = feature[part.labels] if part.labels is not None else [IGNORED] * len(ids)
    names = data.task.model_kwargs().get("id2label", {}) if part.tags else {}
    # what is written is one piece as long as it goes on; of tags each token has its own
    marks = [
        (wanted != IGNORED, i if part.tags and wanted != IGNORED else None, wanted if part.tags else None)
        for i, wanted in enumerate(labels)
    ]
    pieces, place, before = [], 0, ""
    for (supervised, _, tag), group in groupby(marks):
        place, start = place + sum(1 for _ in group), place
        text = _decoded(ids[:place], data)
        # alone a piece would lose the space before it, which decoding leaves out at a beginning
        said = text[len(before) :] if text.startswith(before) else _decoded(ids[start:place], data)
        pieces.append(Piece(said, supervised, str(names.get(tag, tag)) if part.tags and supervised else None))
        before = text
    return tuple(pieces)


def _decoded(ids: list[int], data: TextDataModule) -> str:
    return str(data.tokenizer.decode([t for t in ids if t != IGNORED], skip_special_tokens=False))
