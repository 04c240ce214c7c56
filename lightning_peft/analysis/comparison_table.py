"""A comparison as a table: its columns as people read them, and what they have to know of the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.analysis.comparison import ALPHA, Comparison
from lightning_peft.analysis.settings import Setting, numbers
from lightning_peft.analysis.sizes import size


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: its heading.
        note: what it means, in a sentence.
        values: a number for each setting, by which one sorts; None where it is not known.
        shown: the same as people read it.
    """

    title: str
    note: str
    values: list[float | None]
    shown: list[str]


def columns(comparison: Comparison) -> list[Column]:
    """The table's columns, those without any number left out.

    Args:
        comparison: the report.
    """
    settings = comparison.settings
    kinds = {run.peak_measured for s in settings for run in s.runs if run.peak_bytes is not None}
    taken = {True: "measured on the GPU", False: "counted by the forecast"}
    folders = numbers(settings)
    found = [
        _column("run", "its folder's name", settings, lambda s: _number(folders.get(s.name))),
        _column(
            comparison.monitor,
            "mean over the seeds, and their standard deviation",
            settings,
            lambda s: _score(s, _digits(settings)),
        ),
        _column(
            "ended",
            "pruned trials had fewer steps, so they might have come further",
            settings,
            lambda s: (float(s.pruned), "pruned" if s.pruned else ""),
        ),
        Column(
            "p",
            "chance of such a difference from the best where there is none: Welch's t-test, Holm's correction",
            [comparison.p_values[s.name] for s in settings],
            [_p(comparison.p_values[s.name]) for s in settings],
        ),
        _column("trained", "trained parameters", settings, lambda s: (s.trained, _counted(s.trained))),
        _column("saved", "bytes of the best checkpoint", settings, lambda s: _sized(s.checkpoint_bytes)),
        _column("step", "median time between the starts of two steps", settings, lambda s: _timed(s.step_seconds)),
        _column(
            "memory",
            "the most that a step takes, " + " or ".join(taken[kind] for kind in sorted(kinds)),
            settings,
            lambda s: _sized(s.peak_bytes),
        ),
        _column(
            "forgot",
            f"what was lost of the base's own ability: {lost_in(settings)}; mean over the seeds, and their standard "
            "deviation",
            settings,
            lambda s: (s.forgetting, _forgotten(s)),
        ),
    ]
    return [column for column in found if any(column.shown)]


def lost_in(settings: Sequence[Setting]) -> str:
    """What is counted as forgotten, with its unit.

    Args:
        settings: those that are compared.
    """
    kinds = {run.forgetting_kind for s in settings for run in s.runs if run.forgetting is not None}
    told = {"loss": "growth of the loss on held-out text (nats a token)", "cka": "drift of the layers (1 - CKA)"}
    return " or ".join(told[kind] for kind in sorted(told, reverse=True) if kind in kinds)


def _forgotten(setting: Setting) -> str:
    if setting.forgetting is None:
        return ""
    spread = setting.forgetting_spread
    return f"{setting.forgetting:.3g}" + ("" if spread is None else f" ± {spread:.2g}")


def _column(title: str, note: str, settings: Sequence[Setting], cell: Any) -> Column:
    cells = [cell(setting) for setting in settings]
    return Column(title, note, [value for value, _ in cells], [shown for _, shown in cells])


def _number(folder: str | None) -> tuple[float | None, str]:
    return (float(folder), folder) if folder is not None and folder.isdecimal() else (None, folder or "")


def _digits(settings: Sequence[Setting]) -> int:
    """Decimals that show the middle one of the spreads, and three digits of the smallest score; three at least."""
    spreads = sorted(s.spread for s in settings if s.spread)
    finest = [spreads[len(spreads) // 2]] if spreads else []
    finest += [min((abs(s.score) for s in settings if s.score), default=1.0) / 100]
    return min(9, max(3, *(-math.floor(math.log10(value)) for value in finest)))


def _score(setting: Setting, digits: int) -> tuple[float, str]:
    shown = f"{setting.score:.{digits}f}"
    return setting.score, shown if setting.spread is None else f"{shown} ± {setting.spread:.{digits}f}"


def _counted(number: int) -> str:
    for unit, one in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * one:
            return f"{number / one:.3g} {unit}"
    return str(number)


def _sized(count: float | None) -> tuple[float | None, str]:
    return count, "" if count is None else size(count)


def _timed(seconds: float | None) -> tuple[float | None, str]:
    if seconds is None:
        return None, ""
    return seconds, f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.2g}"


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the numbers.

    Args:
        comparison: the report.
    """
    settings = comparison.settings
    found = []
    seeds = {tuple(run.seed for run in s.runs) for s in settings}
    if len(seeds) > 1:
        told = ", ".join(f"{s.name} {len(s.runs)}" for s in settings)
        found.append(f"The settings do not all have the same seeds; how many: {told}.")
    elif len(settings[0].runs) > 1:
        found.append(f"Means and standard deviations of {len(settings[0].runs)} seeds each.")
    if any(len(s.runs) == 1 for s in settings):
        found.append("Settings with one seed have no spread: their differences may be chance.")
    unlike = [s.name for s in settings if (p := comparison.p_values[s.name]) is not None and p < ALPHA]
    tested = [s.name for s in settings if comparison.p_values[s.name] is not None]
    if tested:
        alike = len(tested) - len(unlike)
        found.append(
            f"{len(unlike)} of {len(tested)} other settings differ from {settings[0].name} at p < {ALPHA:g}; the seeds "
            f"do not tell {alike} from it."
            if alike
            else f"All {'others' if len(tested) == len(settings) - 1 else 'that could be tested'} differ from "
            f"{settings[0].name} at p < {ALPHA:g}."
        )
    if comparison.repeated:
        told = ", ".join(path.name for path in comparison.repeated)
        found.append(f"Runs that were made again with the same settings and seed do not count: {told}.")
    if len({s.runs[0].settings.get("data.train_files") for s in settings}) > 1:
        found.append("The settings were trained on different data.")
    return found


def fronts(comparison: Comparison) -> list[str]:
    """Which settings no other is as good as for as little, a sentence for each cost; none where one alone is compared.

    Args:
        comparison: the report.
    """
    settings, told = comparison.settings, []
    for what, names in {"memory": comparison.by_memory, "time": comparison.by_time}.items():
        if names and len(settings) > 1:
            those = "; ".join(s.name for s in settings if s.name in names)
            told.append(f"No other is as good in as little {what}: {'all' if len(names) == len(settings) else those}.")
    return told
