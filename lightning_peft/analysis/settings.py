"""Runs that differ in their seed alone are one setting, named by what tells it from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from lightning_peft.analysis.runs import Run

LONG = 34
"""Characters of a name that a drawing has room for."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
        name: the method's, and the options in which it differs from the others.
        runs: one a seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def scores(self) -> list[float]:
        """The metric's best value in each run."""
        return [run.score for run in self.runs]

    @property
    def score(self) -> float:
        """The mean of the scores."""
        return mean(self.scores)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the scores; None with one run."""
        return stdev(self.scores) if len(self.runs) > 1 else None

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.runs[0].trained

    def average(self, number: Callable[[Run], float | None]) -> float | None:
        """The mean of a number over the runs that have it; None where none has.

        Args:
            number: of a run.
        """
        found = [value for run in self.runs if (value := number(run)) is not None]
        return mean(found) if found else None

    @property
    def checkpoint_bytes(self) -> float | None:
        """Bytes of a checkpoint."""
        return self.average(lambda run: run.checkpoint_bytes)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step."""
        return self.average(lambda run: run.step_seconds)

    @property
    def peak_bytes(self) -> float | None:
        """Bytes at a step's peak."""
        return self.average(lambda run: run.peak_bytes)

    @property
    def forgetting(self) -> float | None:
        """How much of the base's ability was lost."""
        return self.average(lambda run: run.forgetting)

    @property
    def forgetting_spread(self) -> float | None:
        """The standard deviation of what was lost; None where one run has it, or none."""
        found = [run.forgetting for run in self.runs if run.forgetting is not None]
        return stdev(found) if len(found) > 1 else None

    @property
    def pruned(self) -> bool:
        """Whether a search ended it early."""
        return any(run.pruned for run in self.runs)


def by_setting(runs: Sequence[Run]) -> list[Setting]:
    """Runs that differ in nothing but their seed, together, under a name that tells them from the others.

    Args:
        runs: the runs; of two with one seed the later one counts, as the same run twice is no second sample.
    """
    runs = _without_seeds(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        options = sorted((name, _plain(value)) for name, value in run.settings.items())
        groups.setdefault(repr((run.method, options)), []).append(run)
    shown = _varying(runs)
    found = []
    for members in groups.values():
        first = members[0]
        own = _varying([run for run in runs if run.method == first.method])
        keys = [k for k in first.settings if k in (own if _is_a_methods(k) else shown)]
        told = [f"{k.removeprefix('method.')}={_told(first.settings[k], k, runs)}" for k in keys]
        seeds = {run.seed: run for run in members}
        found.append(Setting(", ".join([first.method, *told]), tuple(seeds[seed] for seed in sorted(seeds))))
    names = Counter(setting.name for setting in found)
    return [s if names[s.name] == 1 else replace(s, name=f"{s.name} ({s.runs[0].folder})") for s in found]


def _is_a_methods(option: str) -> bool:
    """Whether each method has a default of its own for an option, so that between methods it tells nothing."""
    return option.startswith("method.") or option == "optimizer.lr"


def _plain(value: Any) -> str:
    """A value in words, in which a whole number is the same with and without a point."""
    return repr(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def _without_seeds(runs: Sequence[Run]) -> list[Run]:
    """The runs without settings that are the run's seed in each of them, such as ``data.seed`` by default."""
    names = {name for run in runs for name in run.settings if name.endswith(".seed")}
    follow = {name for name in names if all(run.settings.get(name, run.seed) == run.seed for run in runs)}
    return [replace(run, settings={k: v for k, v in run.settings.items() if k not in follow}) for run in runs]


def numbers(settings: Sequence[Setting]) -> dict[str, str]:
    """Short names for settings whose own say too much for a drawing: those of their runs' folders, often numbers.

    Args:
        settings: the settings.

    Returns:
        Name to folder's name, of the settings with one run whose method has a long name among them; empty where two of
        these folders have one name.
    """
    alone = [s for s in settings if len(s.runs) == 1]
    methods = {s.runs[0].method for s in alone if len(s.name) > LONG}
    found = {s.name: s.runs[0].folder.name for s in alone if s.runs[0].method in methods}
    return found if len(set(found.values())) == len(found) else {}


def _told(value: Any, name: str, runs: Sequence[Run]) -> Any:
    """A number with no more digits than tell it from those of the other runs, but three at least."""
    if not isinstance(value, float):
        return value
    others = {found for run in runs if isinstance(found := run.settings.get(name), float)}
    for digits in range(3, 17):
        if len({f"{other:.{digits}g}" for other in others}) == len(others):
            return f"{value:.{digits}g}"
    return value


def _varying(runs: Sequence[Run]) -> set[str]:
    """Settings that are not the same in all runs."""
    names = {name for run in runs for name in run.settings}
    return {name for name in names if len({_plain(run.settings.get(name)) for run in runs}) > 1}
