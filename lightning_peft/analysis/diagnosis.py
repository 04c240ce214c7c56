"""What is said of one thing that may be wrong with a run: found, not found, or not looked at, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Self

BEYOND_NOISE = 2.0
"""Standard errors by which two means must differ: by chance alone they do in one case of twenty."""

ROSE = 1.1
"""Times the first quarter's loss from which the last one's has risen, if it is beyond `CLEARLY` as well."""

CLEARLY = 3.0
"""Standard errors for what ought never to be, such as a loss that rises: by chance alone one case in a thousand."""

_FEWEST = 8
"""Losses below which nobody can tell a fall from noise: two in each quarter."""


@dataclass(frozen=True)
class Diagnosis:
    """A decision with its reason.

    Attributes:
        subject: what was looked at.
        evidence: what was seen, in numbers; or why nothing could be.
        found: what is wrong, in a sentence; None where nothing is.
        remedy: what to do about it, with the option to write.
        seen: whether it could be looked at.
    """

    subject: str
    evidence: str
    found: str | None = None
    remedy: str = ""
    seen: bool = True

    @classmethod
    def unseen(cls, subject: str, why: str) -> Self:
        """Where something could not be looked at.

        Args:
            subject: what.
            why: what is missing.
        """
        return cls(subject, why, seen=False)


@dataclass(frozen=True)
class LossCurve:
    """A training's losses, by quarters of its steps.

    Attributes:
        steps: the steps that they are of, in their order.
        losses: the loss at each; all finite.
    """

    steps: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def tells(self) -> bool:
        """Whether there are enough to judge by."""
        return len(self.losses) >= _FEWEST

    def quarter(self, number: int) -> tuple[float, ...]:
        """The losses of a quarter.

        Args:
            number: from 0 to 3.
        """
        count = len(self.losses)
        return self.losses[number * count // 4 : (number + 1) * count // 4]

    @property
    def start(self) -> float:
        """The loss before much was learnt: the mean of the first fortieth, of one value at least."""
        return fmean(self.losses[: max(1, len(self.losses) // 40)])

    @property
    def end(self) -> float:
        """The mean of the last quarter."""
        return fmean(self.quarter(3))

    def fall(self, first: int = 0, last: int = 3) -> tuple[float, float]:
        """By how much the loss fell from a quarter to another, and how much of it may be noise.

        Args:
            first: the earlier quarter.
            last: the later one.

        Returns:
            The difference of the means, and its standard error.
        """
        before, after = self.quarter(first), self.quarter(last)
        error = (_variance(before) / len(before) + _variance(after) / len(after)) ** 0.5
        return fmean(before) - fmean(after), error

    @property
    def fell(self) -> bool:
        """Whether it fell by more than noise."""
        fall, error = self.fall()
        return fall > BEYOND_NOISE * error

    @property
    def rose(self) -> bool:
        """Whether it rose, clearly."""
        fall, error = self.fall()
        return -fall > CLEARLY * error and self.end > ROSE * fmean(self.quarter(0))

    def __str__(self) -> str:
        return f"training loss {number(self.start)} at first, {number(self.end)} in the last quarter"


def _variance(values: Sequence[float]) -> float:
    """An estimate of the spread of what the values were drawn from."""
    return pvariance(values) * len(values) / max(1, len(values) - 1)


def number(value: float) -> str:
    """A number with the digits that mean something.

    Args:
        value: the number.

    Example:
        >>> number(0.0012345), number(2e-7), number(12345.6)
        ('0.00123', '2e-07', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
