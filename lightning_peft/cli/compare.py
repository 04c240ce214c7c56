"""The ``compare`` command: what the runs of a sweep, or any runs, say about their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.comparison import Comparison, compared
from lightning_peft.analysis.comparison_report import search_note, write_report
from lightning_peft.analysis.comparison_table import Column, columns, fronts, notes
from lightning_peft.analysis.run_files import why_failed
from lightning_peft.analysis.runs import Run, find_runs, read_run
from lightning_peft.analysis.study import INSTALL, Search, read_search
from lightning_peft.cli.report import short

_NAME = 18  # characters that a setting's name has room for at least, "gradual_unfreezing" among them
_LISTED = 8  # runs that are left out that are named in a terminal; the page has all


def compare(config: DictConfig) -> Path:
    """Compares finished runs in a table, and writes a page with plots, pictures and numbers.

    Returns:
        The page.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no run.
        ValueError: if no run has ended, or they were judged by several metrics.
    """
    folders = [config.folders] if isinstance(config.folders, str) else list(config.folders)
    runs, left_out = _read(folders)
    searches = _searches(folders)
    search = searches[0] if len(searches) == 1 else None
    pruned = {found.run(trial) for found in searches for trial in found.trials if trial.state == "pruned"}
    comparison = compared([replace(run, pruned=run.folder in pruned) for run in runs])
    page = write_report(comparison, left_out, Path(config.run_dir), search)
    _print(comparison, left_out)
    if search is not None:
        Console(highlight=False, markup=False).print(search_note(search))
    print(f"\nwith plots           {short(page)}\nas pictures, CSV     {short(page.parent)}")
    return page


def _read(folders: Sequence[str]) -> tuple[list[Run], dict[Path, str]]:
    """The runs that can be compared, and the folders of the others with the reason.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no run.
        ValueError: if no run can be compared.
    """
    finished, unfinished = find_runs(folders)
    runs: list[Run] = []
    reasons = {folder: why_failed(folder) for folder in unfinished}
    left_out = {folder: f"failed: {why}" if why else "did not end" for folder, why in reasons.items()}
    for folder in finished:
        try:
            runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            left_out[folder] = str(error)
    if not runs:
        told = "; ".join(f"{short(folder)}: {reason}" for folder, reason in list(left_out.items())[:_LISTED])
        raise ValueError(f"none of the {len(left_out)} runs in {', '.join(folders)} can be compared: {told}")
    return runs, left_out


def _searches(folders: Sequence[str]) -> list[Search]:
    """The studies of which runs are trials; a page has room for one."""
    try:
        searches = [found for folder in folders if (found := read_search(Path(folder))) is not None]
    except ModuleNotFoundError:
        print(f"A search is among the folders, which is drawn with Optuna: {INSTALL}")
        return []
    if len(searches) > 1:
        print(
            f"The folders hold {len(searches)} searches; a page shows how one went on, so compare each by itself too."
        )
    return searches


def _print(comparison: Comparison, left_out: Mapping[Path, str]) -> None:
    console = Console(highlight=False, markup=False)  # options such as [q_proj] are no markup
    told = columns(comparison)
    words = [len(word) for setting in comparison.settings for word in setting.name.split()]
    shown = _that_fit(told, console.width - min(max(_NAME, *words), console.width // 2))
    console.print(_table(comparison, shown))
    console.print(Text.assemble("\n", (f"Take {comparison.recommended}.", "bold"), f" {comparison.reason}."))
    for note in notes(comparison):
        console.print(note)
    for front in fronts(comparison):
        console.print(front)
    if len(shown) < len(told):
        console.print(f"Not shown for want of room: {', '.join(c.title for c in told[len(shown) :])}.")
    if left_out:
        reasons = [f"{short(folder)} ({reason})" for folder, reason in list(left_out.items())[:_LISTED]]
        more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
        console.print(f"Left out: {', '.join(reasons)}{more}")


def _that_fit(found: list[Column], room: int) -> list[Column]:
    """The first columns, as many as a line has room for."""
    kept = []
    for column in found:
        room -= 1 + max(map(len, (column.title, *column.shown)))
        if room < 0:
            break
        kept.append(column)
    return kept


def _table(comparison: Comparison, shown: list[Column]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", overflow="fold")
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    for place, setting in enumerate(comparison.settings):
        style = "bold" if setting.name == comparison.recommended else ""
        table.add_row(setting.name, *(column.shown[place] for column in shown), style=style)
    return table
