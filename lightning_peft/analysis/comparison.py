"""Runs side by side: means over seeds, what is worth its cost, which differences are more than chance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from lightning_peft.analysis.runs import Run
from lightning_peft.analysis.settings import Setting, by_setting
from lightning_peft.analysis.sizes import size

ALPHA = 0.05
"""The chance of calling any difference from a report's best setting real where there is none, about."""

_NAMED = 4  # settings that a sentence has room for

_ROUNDING = 1e-6
"""What metrics in float32 differ by where they are the same, relative to them."""

Cost = Callable[[Setting], float | None]


@dataclass(frozen=True)
class Comparison:
    """What a report says.

    Attributes:
        settings: the best first.
        monitor: the metric by which all were judged.
        mode: ``"max"`` or ``"min"``.
        p_values: for each setting the chance of a difference from the best as large as that which was seen, by
            Welch's test with Holm's correction; None for the best itself, and where one of the two has a single seed.
        by_memory: names of the settings that no other beats in the metric for as little memory.
        by_time: the same for the time of a step.
        recommended: the name of the setting that one would take.
        reason: why, in a sentence.
        repeated: folders of runs that were made again later, with the same settings and seed, and do not count.
    """

    settings: tuple[Setting, ...]
    monitor: str
    mode: str
    p_values: dict[str, float | None]
    by_memory: frozenset[str]
    by_time: frozenset[str]
    recommended: str
    reason: str
    repeated: tuple[Path, ...] = ()


def compared(runs: Sequence[Run]) -> Comparison:
    """Puts runs side by side.

    Args:
        runs: finished ones, judged by one metric.

    Raises:
        ValueError: if there is no run, or they were judged by several metrics.
    """
    monitors = {f"{run.monitor} ({run.mode})": run.folder for run in reversed(runs)}
    if len(monitors) != 1:
        told = ", ".join(f"{monitor} in {folder}" for monitor, folder in sorted(monitors.items()))
        raise ValueError(f"runs that are compared are judged by one metric, but got {told or 'no run'}")
    sign = 1 if runs[0].mode == "max" else -1
    settings = tuple(sorted(by_setting(runs), key=lambda s: -sign * s.score))
    chances = p_values(settings)
    recommended, reason = recommend(settings, sign)
    untold = [s.name for s in settings[1:] if (p := chances[s.name]) is not None and p >= ALPHA]
    if recommended is settings[0] and untold:
        reason += f"; but so few seeds do not tell it from {'; '.join(untold[:_NAMED])}" + (
            f" and {len(untold) - _NAMED} more" if len(untold) > _NAMED else ""
        )
    counted = {run.folder for s in settings for run in s.runs}
    alike = {run.peak_measured for run in runs if run.peak_bytes is not None}
    return Comparison(
        settings=settings,
        monitor=runs[0].monitor,
        mode=runs[0].mode,
        p_values=chances,
        # what was measured and what was counted are not of one kind
        by_memory=pareto(settings, lambda s: s.peak_bytes, sign) if len(alike) == 1 else frozenset(),
        by_time=pareto(settings, lambda s: s.step_seconds, sign),
        recommended=recommended.name,
        reason=reason,
        repeated=tuple(run.folder for run in runs if run.folder not in counted),
    )


def pareto(settings: Sequence[Setting], cost: Cost, sign: int) -> frozenset[str]:
    """The settings for which no other has as good a metric at as little cost, and one of the two better.

    Args:
        settings: the settings; those without a cost are left out.
        cost: of a setting, the less the better.
        sign: 1 where more of the metric is better, -1 where less.

    Returns:
        Their names.
    """
    points = [(s.name, sign * s.score, value) for s in settings if (value := cost(s)) is not None]
    return frozenset(
        name
        for name, good, value in points
        if not any((g >= good and v <= value) and (g > good or v < value) for _, g, v in points)
    )


def p_values(settings: Sequence[Setting]) -> dict[str, float | None]:
    """How likely differences from the best are by chance: Welch's t-test on the seeds' scores, two-sided.

    The values are corrected by Holm's step-down procedure (Holm 1979) for all pairs of settings: the best is chosen by
    looking, so each of the pairs might have been the one that is told. What varies is the training; the validation rows
    are the same for all seeds, so what other rows would say is not in it.

    Args:
        settings: the best first.

    Returns:
        Name to value. None for the best, where one of the two has a single seed, and where nothing varies: then nothing
        tells how large chance is.
    """
    best, *others = settings
    raw = {s.name: value for s in others if (value := _welch(best.scores, s.scores)) is not None}
    several = sum(len(s.runs) > 1 for s in settings)
    pairs = several * (several - 1) // 2
    found: dict[str, float | None] = dict.fromkeys((s.name for s in settings), None)
    largest = 0.0
    for place, (name, value) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (pairs - place)))
        found[name] = largest
    return found


def _welch(first: list[float], second: list[float]) -> float | None:
    if min(len(first), len(second)) < 2:
        return None
    if stdev(first) + stdev(second) <= _ROUNDING * max(map(abs, first + second)):
        return None
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():  # of seeds that are alike in one of the two, which is no mistake
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ttest_ind(first, second, equal_var=False).pvalue)


def recommend(settings: Sequence[Setting], sign: int) -> tuple[Setting, str]:
    """The cheapest setting that is as good as the best, as far as the seeds can tell.

    By the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3): of those
    whose mean lies within one standard error of the best's, the one with the least memory, or with the fewest trained
    parameters where memory is not known.

    Args:
        settings: the best first.
        sign: 1 where more of the metric is better, -1 where less.

    Returns:
        The setting, and why.
    """
    best = settings[0]
    name = best.runs[0].monitor
    if best.spread is None:
        return (
            best,
            f"It has the best {name}, {best.score:.4g}, with one seed; only more can tell how close others come",
        )
    error = best.spread / math.sqrt(len(best.runs))
    close = [s for s in settings if sign * (best.score - s.score) <= error]
    by_memory = all(s.peak_bytes is not None for s in close)
    chosen = min(close, key=lambda s: (s.peak_bytes or 0) if by_memory else s.trained)
    if chosen is best:
        what = "takes the least memory" if by_memory else "trains the fewest parameters"
        others = f"no other lies within one standard error ({error:.2g})"
        alone = len(close) == 1
        return best, f"It has the best {name}, {best.score:.4g}, and " + (
            others if alone else f"{what} of those within one standard error ({error:.2g})"
        )
    less = (
        f"takes {size(chosen.peak_bytes or 0)} of memory instead of {size(best.peak_bytes or 0)}"
        if by_memory
        else f"trains {chosen.trained:,} parameters instead of {best.trained:,}"
    )
    return chosen, (
        f"It reaches {chosen.score:.4g} in {name}, within one standard error ({error:.2g}) of the best, {best.name} "
        f"with {best.score:.4g}, and {less}"
    )
