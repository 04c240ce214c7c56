"""What a comparison leaves in a folder: one page that needs nothing beside it, its drawings, and its numbers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.analysis.comparison import Comparison
from lightning_peft.analysis.comparison_plots import figures, group_of
from lightning_peft.analysis.comparison_table import columns, fronts, notes
from lightning_peft.analysis.plots import page_style, page_svg
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
        fronts=fronts(comparison),
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
    folders = {trial.number: search.run(trial) for trial in search.trials}
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
            "pruned": s.pruned,
            "p": comparison.p_values[s.name],
            "trained_parameters": s.trained,
            "checkpoint_bytes": s.checkpoint_bytes,
            "step_seconds": s.step_seconds,
            "peak_bytes": s.peak_bytes,
            "forgetting": s.forgetting,
            "forgetting std": s.forgetting_spread,
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
