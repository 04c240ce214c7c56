"""Entities in tagged words, by the definition of the CoNLL-2000 evaluation, which seqeval's default follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

OUTSIDE = "O"
_LETTERS = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S"}  # BILOU's last and unit are BIOES' end, single


class Entity(NamedTuple):
    """Words ``start`` to ``end``, the latter not included, that are of a type."""

    type: str
    start: int
    end: int


def mark_entities(tags: Iterable[str]) -> bool:
    """Whether tags say where entities begin and end, as ``B-PER`` or a bare ``I`` do; others name a word's own class.

    Args:
        tags: all that there are.
    """
    marks = [tag for tag in tags if tag != OUTSIDE]
    return bool(marks) and all(tag[:1] in _LETTERS and tag[1:2] in ("", "-") for tag in marks)


def _parted(tag: str | None, marked: bool) -> tuple[str, str]:
    if tag is None or tag == OUTSIDE:
        return OUTSIDE, ""
    return (_LETTERS[tag[0]], tag[2:] or "_") if marked else ("S", tag)


def types_of(tags: Iterable[str]) -> list[str]:
    """The types of entities that tags can mark, sorted."""
    tags = list(tags)
    marked = mark_entities(tags)
    return sorted({_parted(tag, marked)[1] for tag in tags if tag != OUTSIDE})


def entities(tags: Sequence[str | None], *, marked: bool) -> list[Entity]:
    """The entities of a sentence.

    An entity ends, or begins, where the tag is B or S, follows an E or S, or is of another type than the one before.
    So tags of IOB1, IOB2 and BIOES are read alike, and an I after O begins an entity.

    Args:
        tags: of its words; None where nobody said one.
        marked: whether the tags are such as `mark_entities` tells; else each word but those tagged O is an entity.
    """
    found: list[Entity] = []
    before, kind, start = OUTSIDE, "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, its_kind = _parted(tag, marked)
        if letter in "BSO" or before in "ESO" or kind != its_kind:
            if before != OUTSIDE:
                found.append(Entity(kind, start, place))
            start = place
        before, kind = letter, its_kind
    return found


class EntityScores(Metric):
    """Precision, recall and F1 of entities, overall and of each type, and the share of words with the right tag.

    Overall values are over all entities together (micro). An entity counts as found if type, beginning and end are
    right. What is undefined is 0, but NaN for a type that occurs nowhere. States are counts, which ranks add up.

    Args:
        tags: all that there are.
    """

    full_state_update: bool | None = False
    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    found: Tensor
    said: Tensor
    expected: Tensor
    right_words: Tensor
    lost_words: Tensor
    words: Tensor

    def __init__(self, tags: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.marked = mark_entities(tags)
        self.types = types_of(tags)
        for name in ("found", "said", "expected"):
            self.add_state(name, torch.zeros(len(self.types), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("right_words", "lost_words", "words"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, said: Sequence[Sequence[str | None]], expected: Sequence[Sequence[str]]) -> None:
        """Adds sentences.

        Args:
            said: the tag of each word, None for words that the model did not see.
            expected: the same from the data.
        """
        number = {kind: n for n, kind in enumerate(self.types)}
        counts = torch.zeros(3, len(self.types), dtype=torch.long)
        for ours, theirs in zip(said, expected, strict=True):
            a, b = (set(entities(tags, marked=self.marked)) for tags in (ours, theirs))
            for row, some in enumerate((a & b, a, b)):
                for entity in some:
                    counts[row, number[entity.type]] += 1
        pairs = [pair for row in zip(said, expected, strict=True) for pair in zip(*row, strict=True)]
        device = self.words.device
        for state, count in zip((self.found, self.said, self.expected), counts.to(device), strict=True):
            state += count
        self.right_words += sum(a == b for a, b in pairs)
        self.lost_words += sum(a is None for a, _ in pairs)
        self.words += len(pairs)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``f1``, ``accuracy``, ``words_lost``, and ``PER/f1`` and so on, scalars."""
        values = _scores(self.found.sum(), self.said.sum(), self.expected.sum())
        values["accuracy"] = self.right_words / self.words.clamp_min(1)
        values["words_lost"] = self.lost_words / self.words.clamp_min(1)
        for kind, found, said, expected in zip(self.types, self.found, self.said, self.expected, strict=True):
            occurs = said + expected > 0
            for name, value in _scores(found, said, expected).items():
                values[f"{kind}/{name}"] = torch.where(occurs, value, torch.nan)
        return values


def _scores(found: Tensor, said: Tensor, expected: Tensor) -> dict[str, Tensor]:
    precision, recall = found / said.clamp_min(1), found / expected.clamp_min(1)
    f1 = 2 * found / (said + expected).clamp_min(1)
    return {"precision": precision, "recall": recall, "f1": f1}
