"""What a model will see of its data, in numbers and in a few examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LOST = 0.05
"""Share of the supervised tokens that a cut may take before anything is said of it."""

_BINS = 12


@dataclass(frozen=True)
class Spread:
    """How numbers are spread: lengths in tokens, widths in pixels, the targets of a regression.

    Attributes:
        smallest: the smallest.
        median: the one in the middle.
        high: that which 95% do not exceed.
        largest: the largest.
        edges: the borders of the bins, one more than there are bins.
        counts: how many lie in each bin.
        unit: what is counted; empty for plain numbers.
        limit: where they are cut; None where they are not.
    """

    smallest: float
    median: float
    high: float
    largest: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    unit: str = ""
    limit: int | None = None

    @classmethod
    def of(cls, numbers: Any, unit: str = "", limit: int | None = None) -> Spread:
        """The spread of one number or more.

        Args:
            numbers: ``(rows,)``; whole numbers get bins of whole widths.
            unit: what is counted.
            limit: where they are cut.
        """
        found = np.asarray(numbers)
        smallest, largest = found.min(), found.max()
        if np.issubdtype(found.dtype, np.integer):
            width = max(1, -(-(int(largest) - int(smallest) + 1) // _BINS))
            # the last bin ends with the largest: where rows are cut, it is full
            edges = np.array([int(smallest), *np.arange(int(largest) + 1, int(smallest), -width)[::-1]])
        else:
            edges = np.linspace(smallest, largest, _BINS + 1) if largest > smallest else np.array([smallest, largest])
        counts, _ = np.histogram(found, edges)
        middle, high = np.quantile(found, [0.5, 0.95], method="inverted_cdf")
        borders, bins = tuple(edges.tolist()), tuple(counts.tolist())
        return cls(smallest.item(), middle.item(), high.item(), largest.item(), borders, bins, unit, limit)


@dataclass(frozen=True)
class Cut:
    """What ``max_length`` takes away, against the same rows encoded without it.

    Attributes:
        looked_at: rows that were compared.
        rows: of them, those that lost tokens.
        tokens: tokens of these rows without the cut.
        tokens_lost: of them, those that the model does not see.
        supervised: supervised tokens without the cut; 0 where no token is supervised.
        supervised_lost: of them, those that are not learnt.
        enough: the least length of a row with which no more than `LOST` of the supervised tokens can be lost; 0 where
            no token is supervised.
    """

    looked_at: int
    rows: int
    tokens: int
    tokens_lost: int
    supervised: int
    supervised_lost: int
    enough: int


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of a split.

    Attributes:
        all: of all its examples.
        supervised: those on which the loss counts; None where it counts on whole examples.
        cut: what is cut off; None where rows are joined instead of cut.
    """

    all: int
    supervised: int | None
    cut: Cut | None


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    Attributes:
        examples: what the model is given of it one by one: rows, or the blocks that a task makes of them.
        rows: rows that were read; of a stream those that were looked at.
        streamed: whether there may be more rows than were looked at.
        spreads: what is measured of an example by name: the length of each of its texts, an image's width and height,
            the target of a regression.
        tokens: how many there are; None where it has no texts.
        labels: how often each label occurs, the most frequent first; None where there are no labels.
        duplicates: rows that equal an earlier one of the split.
        same_inputs: rows whose inputs, not all of the row, equal those of an earlier one.
        in_training: rows that are in the training split too.
        inputs_in_training: rows whose inputs, not all of the row, are in the training split too.
    """

    examples: int
    rows: int
    streamed: bool
    spreads: dict[str, Spread]
    tokens: TokenCounts | None
    labels: dict[str, int] | None
    duplicates: int
    same_inputs: int
    in_training: int
    inputs_in_training: int


@dataclass(frozen=True)
class Piece:
    """A stretch of decoded tokens.

    Attributes:
        text: what they say.
        supervised: whether the loss counts on them.
        tag: the token's class, where tokens are sorted into classes.
    """

    text: str
    supervised: bool
    tag: str | None = None


@dataclass(frozen=True)
class ShownText:
    """The texts of an example as the model reads them.

    Attributes:
        sequences: its sequences of tokens by name, each in pieces.
        tokens: how many tokens it has.
        supervised: on how many of them the loss counts; None where it counts on the example.
        whole: how many tokens it would have if it were not cut; None where rows are joined.
    """

    sequences: dict[str, tuple[Piece, ...]]
    tokens: int
    supervised: int | None
    whole: int | None

    @property
    def size(self) -> str:
        """How long it is, in words."""
        cut = f", cut from {self.whole:,}" if self.whole is not None and self.whole > self.tokens else ""
        learnt = "" if self.supervised is None else f", {self.supervised:,} learnt"
        return f"{self.tokens:,} tokens{cut}{learnt}"


@dataclass(frozen=True)
class ShownImage:
    """The image of an example.

    Attributes:
        width: in pixels, as it is stored.
        height: in pixels.
        png: what the model sees of it, a small PNG in base 64.
    """

    width: int
    height: int
    png: str

    @property
    def size(self) -> str:
        """How large it is, in words."""
        return f"{self.width:,} x {self.height:,} pixels"


@dataclass(frozen=True)
class Shown:
    """One example as the model sees it.

    Attributes:
        split: where it is from.
        place: file and line.
        targets: what is learnt besides tokens, such as a label.
        text: its texts, if it has any.
        image: its image, if it has one.
    """

    split: str
    place: str
    targets: dict[str, str]
    text: ShownText | None = None
    image: ShownImage | None = None

    @property
    def size(self) -> str:
        """How long or large it is, in words."""
        return ", ".join(part.size for part in (self.text, self.image) if part is not None)


@dataclass(frozen=True)
class DataSummary:
    """What a model will see of its data.

    Attributes:
        task: the task's name.
        origin: where the data comes from.
        seen_as: what is made of it, such as ``"cut to 64 tokens"``.
        made_by: what does that: the tokenizer or the image processor, in words.
        splits: each by its name, training first.
        examples: some of the training examples.
        notes: sentences on what a person might not expect.
    """

    task: str
    origin: str
    seen_as: str
    made_by: str
    splits: dict[str, SplitSummary]
    examples: tuple[Shown, ...]
    notes: tuple[str, ...]

    @property
    def heading(self) -> str:
        """One line: what the numbers are about."""
        return f"{self.task}: {self.origin}, {self.seen_as}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def percent(part: float, whole: float) -> str:
    """A share in percent, ``"12.3%"``; never 0.0% of something or 100.0% of less than all.

    Args:
        part: how many.
        whole: of how many.
    """
    share = 100 * part / whole if whole else 0.0
    if part and share < 0.1:
        return "<0.1%"
    if part < whole and share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%"


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are.

    Args:
        names: all of them.
        shown: how many to name.
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more
