"""The ``doctor`` command: what is wrong with a run, by its folder, and what to do about it."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from lightning_peft.cli.report import short
from lightning_peft.doctor import Examination, examine


def show_findings(config: DictConfig) -> None:
    """Says what is wrong with a run; the command's exit code is 1 where something is.

    Raises:
        ValueError: if several runs are given, of which the exit code could not tell.
        FileNotFoundError: if the folder is no run's.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("doctor looks at one run at a time, and its exit code is that run's; leave -m out")
    found = examine(Path(str(config.run)), check_base=config.check_base)
    print_examination(found)
    if found.findings:
        sys.exit(1)


def print_examination(examination: Examination, console: Console | None = None) -> None:
    """Prints what was found, then what was looked at and what could not be.

    Args:
        examination: of a run.
        console: where to; None takes the terminal.
    """
    console = console or Console(highlight=False)
    console.print(Text(f"{short(examination.folder)}: {examination.about}", style="bold"))
    for place, finding in enumerate(examination.findings, start=1):
        console.print()
        console.print(Text(f"{place}. {finding.found}", style="bold red"))
        _print_rows(console, [("seen", finding.evidence), ("to do", finding.remedy)], indent=3)
    healthy = [d for d in examination.diagnoses if d.seen and d.found is None]
    console.print()
    if not examination.findings:
        console.print(Text("Nothing found. Looked at:", style="bold green"))
    elif healthy:
        console.print(Text("Nothing else found in:"))
    _print_rows(console, [(d.subject, d.evidence) for d in healthy])
    unseen = [d for d in examination.diagnoses if not d.seen]
    if unseen or examination.lacking:
        console.print()
        console.print(Text("Not looked at:"))
        missing = [("files", sentence) for sentence in examination.lacking]
        _print_rows(console, [*((d.subject, d.evidence) for d in unseen), *missing])


def _print_rows(console: Console, rows: list[tuple[str, str]], indent: int = 2) -> None:
    """Names, and beside them what is said of each; words stay whole, so that they can be copied."""
    room = max((len(name) for name, _ in rows), default=0) + 2
    width = max(console.width - indent - room, 20)
    for name, said in rows:
        lines = textwrap.wrap(said, width, break_long_words=False, break_on_hyphens=False)
        for place, line in enumerate(lines):
            start = Text(" " * indent + (name if place == 0 else "").ljust(room), style="dim")
            console.print(start.append(line, style="not dim"), soft_wrap=True)
