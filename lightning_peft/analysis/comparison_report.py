"""What a comparison leaves in a folder: one page that needs nothing beside it, its drawings, and its numbers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.analysis.comparison import ALPHA, Comparison, Setting, numbers
from lightning_peft.analysis.comparison_plots import figures, group_of
from lightning_peft.analysis.plots import page_style, page_svg
from lightning_peft.analysis.sizes import size
from lightning_peft.analysis.study import Search
from lightning_peft.analysis.study_plots import TITLES as SEARCH_TITLES
from lightning_peft.analysis.study_plots import search_figures
from lightning_peft.formats.writing import written_file

PAGE = "compare.html"
TITLES = {
    "metric_against_memory": "Metric against memory",
    "metric_against_time": "Metric against time",
    "metric_against_parameters": "Metric against trained parameters",
    "learning_curves": "Learning curves",
    "training_loss": "Training loss",
    "forgetting": "Forgetting",
    "drift": "Drift by layer",
    **SEARCH_TITLES,
}


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
        Column(
            "p",
            "chance of such a difference from the best where there is none: Welch's t-test, Holm's correction",
            [comparison.p_values[s.name] for s in settings],
            [_p(comparison.p_values[s.name]) for s in settings],
        ),
        _column("trained", "trained parameters", settings, lambda s: (s.trained, _counted(s.trained))),
        _column("saved", "bytes of the best checkpoint", settings, lambda s: _sized(s.checkpoint_bytes)),
        _column("step", "median time of a step of the optimizer", settings, lambda s: _timed(s.step_seconds)),
        _column(
            "memory",
            "the most that a step takes, " + " or ".join(taken[kind] for kind in sorted(kinds)),
            settings,
            lambda s: _sized(s.peak_bytes),
        ),
        _column(
            "forgot",
            "what was lost of the base's own ability: growth of the loss of held-out text, or 1 - CKA of the layers",
            settings,
            lambda s: (s.forgetting, "" if s.forgetting is None else f"{s.forgetting:.3g}"),
        ),
    ]
    return [column for column in found if any(column.shown)]


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
            f"Of {len(tested)} settings, {len(unlike)} differ from {settings[0].name} at p < {ALPHA:g}; the seeds do "
            f"not tell the other {alike} from it."
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


def write_report(
    comparison: Comparison, left_out: Mapping[Path, str], folder: Path, search: Search | None = None
) -> Path:
    """Writes the page, its drawings as PNG and SVG, and the numbers as CSV, in place of those of an earlier call.

    Args:
        comparison: the report.
        left_out: folders of runs that are not compared, with the reason.
        folder: where to.
        search: the study whose trials the runs are.

    Returns:
        The page.
    """
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    names = [(group_of(comparison, s), s.name) for s in comparison.settings]
    with page_style():
        searched = {} if search is None else search_figures(search, _groups_of_trials(comparison, search))
        for name, figure in {**searched, **figures(comparison)}.items():
            for kind in ("png", "svg"):
                with written_file(folder / f"{name}.{kind}") as scratch:
                    figure.savefig(scratch, format=kind, dpi=160, facecolor="white", metadata=_UNDATED[kind])
            plots.append({"title": TITLES[name], "svg": _grouped(page_svg(figure), dict(names))})
    loader = jinja2.PackageLoader("lightning_peft.analysis", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("compare.html.j2").render(
        comparison=comparison,
        columns=columns(comparison),
        notes=[*notes(comparison), *([] if search is None else [search_note(search)])],
        names=names,
        plots=plots,
        left_out={str(path): reason for path, reason in left_out.items()},
        by_memory=comparison.by_memory if len(comparison.by_memory) > 1 else (),
    )
    with written_file(folder / PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8")
    _write_csv(folder / "settings.csv", _setting_rows(comparison))
    _write_csv(folder / "runs.csv", _run_rows(comparison))
    return folder / PAGE


def search_note(search: Search) -> str:
    """What a reader has to know of a search.

    Args:
        search: the study whose trials are compared.
    """
    states = [trial.state for trial in search.trials]
    told = [f"{count} {state}" for state in dict.fromkeys(states) if (count := states.count(state))]
    found = f"A search of {len(states)} trials by {' and '.join(search.objectives)}: {', '.join(told)}."
    pruned = [str(trial.number) for trial in search.trials if trial.state == "pruned"]
    if pruned:
        found += f" Pruned trials had fewer steps, so they might have come further: {', '.join(pruned)}."
    return found


def _groups_of_trials(comparison: Comparison, search: Search) -> dict[int, str]:
    """For each trial's number the word by which a page finds the setting that its run belongs to."""
    of = {run.folder: group_of(comparison, setting) for setting in comparison.settings for run in setting.runs}
    folders = {trial.number: search.folder / str(trial.number) for trial in search.trials}
    return {number: of[folder] for number, folder in folders.items() if folder in of}


_UNDATED: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}


def _grouped(svg: str, names: dict[str, str]) -> str:
    """The marks of a setting found by class, as one identifier may stand once in a page, and told by their name."""
    import html

    def marked(found: re.Match[str]) -> str:
        return f'<g class="{found[1]}"><title>{html.escape(names[found[1]])}</title>'

    return re.sub(r'<g id="(method-\d+)">', marked, svg)


def _setting_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "setting": s.name,
            f"{comparison.monitor} mean": s.score,
            f"{comparison.monitor} std": s.spread,
            "seeds": len(s.runs),
            "p": comparison.p_values[s.name],
            "trained_parameters": s.trained,
            "checkpoint_bytes": s.checkpoint_bytes,
            "step_seconds": s.step_seconds,
            "peak_bytes": s.peak_bytes,
            "forgetting": s.forgetting,
            "front_of_memory": s.name in comparison.by_memory,
            "front_of_time": s.name in comparison.by_time,
            "recommended": s.name == comparison.recommended,
        }
        for s in comparison.settings
    ]


def _run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    metrics = sorted({name for s in comparison.settings for run in s.runs for name in run.metrics})
    return [
        {
            "setting": s.name,
            "seed": run.seed,
            f"best {comparison.monitor}": run.score,
            **{name: run.metrics.get(name) for name in metrics},
            "trained_parameters": run.trained,
            "checkpoint_bytes": run.checkpoint_bytes,
            "step_seconds": run.step_seconds,
            "peak_bytes": run.peak_bytes,
            "peak_measured": run.peak_measured,
            "forgetting": run.forgetting,
            "folder": str(run.folder),
        }
        for s in comparison.settings
        for run in s.runs
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with written_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()}
            for row in rows
        )
