"""What is seen of rows that are to be trained on, whatever they hold: measures, labels, and how one is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_peft.analysis.data_summary import Shown, Spread, TokenCounts
from lightning_peft.data.files import Example


@dataclass(frozen=True)
class View:
    """A split.

    Attributes:
        examples: its rows; of a stream the first.
        count: how many the model is given one by one: rows, or what a task makes of them.
        spreads: what is measured of them, by name.
        labels: how often each occurs, the most frequent first; None where there are none.
        show: gives the example of a number.
        tokens: how many there are; None where there are no texts.
        is_streamed: whether there may be more rows.
    """

    examples: Sequence[Example]
    count: int
    spreads: dict[str, Spread]
    labels: dict[str, int] | None
    show: Callable[[int], Shown]
    tokens: TokenCounts | None = None
    is_streamed: bool = False


@dataclass(frozen=True)
class Look:
    """All splits.

    Attributes:
        seen_as: what is made of the rows, in words.
        made_by: what makes it.
        views: split to what is seen of it, training first.
        notes: sentences on what a person might not expect.
    """

    seen_as: str
    made_by: str
    views: dict[str, View]
    notes: list[str]


def some(count: int, wanted: int | None) -> list[int]:
    """So many numbers of rows, at random and the same every time, in their order.

    Args:
        count: how many rows there are.
        wanted: how many to choose; None takes all.
    """
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(0).sample(range(count), wanted))
