"""The ``diff`` command: what differs between two adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.difference import Difference, Differences, Side, Subspaces, differences
from lightning_peft.analysis.inspection import shared_prefix
from lightning_peft.analysis.inspection_report import add_rows
from lightning_peft.cli.opened import opened
from lightning_peft.cli.report import short
from lightning_peft.formats.reading import naming
from lightning_peft.formats.writing import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

NUMBERS = "diff.json"
_ROWS = 48  # of more, those that differ most
_NAMES = 6


def show_difference(config: DictConfig) -> Differences:
    """Shows what differs between two adapters' folders or checkpoints; their base is not read.

    Raises:
        FileNotFoundError: if there is no such adapter.
        FileExistsError: if the folder of ``to`` has such numbers already.
        ValueError: if a file is damaged.
    """
    numbers = None if config.to is None else Path(config.to) / NUMBERS
    if numbers is not None and numbers.exists():
        raise FileExistsError(f"{numbers} exists; choose another folder with to=..., or move it away")
    files = [opened(str(path)) for path in (config.a, config.b)]
    with naming(f"{config.a} and {config.b}"):
        found = differences(*(Side(f.method, f.base, f.tensors) for f in files))
    print_differences(found, str(config.a), str(config.b))
    if numbers is not None:
        write_json(numbers, {"a": str(config.a), "b": str(config.b), **json.loads(json.dumps(found.to_dict()))})
        print(f"\nas numbers           {short(numbers)}")
    return found


def print_differences(found: Differences, a: str, b: str) -> None:
    """Prints what differs.

    Args:
        found: the differences.
        a: what the first is called.
        b: what the second is called.
    """
    console = Console(highlight=False)
    console.print(Text(f"a  {a}\nb  {b}", style="bold"), soft_wrap=True)
    for line in _in_words(found) or ["Method, options, base and the names of the tensors are the same"]:
        console.print(Text(line))
    if found.changes:
        _print_table(console, found.changes, "module")
        console.print("columns, rows: what the directions have in common, from 0 to 1 (arXiv 2106.09685, 7.2)")
    if found.note is not None:
        console.print(Text(found.note, style="yellow"))
    if found.tensors:
        _print_table(console, found.tensors, "tensor")
    if found.changes or found.tensors:
        console.print("difference: relative to both norms; 0% the same, 100% unrelated, 141% opposite")


def _in_words(found: Differences) -> list[str]:
    """What differs beside numbers, a line each."""
    lines = []
    for subject, differing in (("base ", found.base), ("", found.options)):
        for name, (first, second) in differing.items():
            lines.append(f"{subject}{name}: {_said(first)} in a, {_said(second)} in b")
    for side, names in zip("ab", found.only, strict=True):
        if names:
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            lines.append(f"only in {side}: {', '.join(names[:_NAMES])}{more}")
    for name, (a_shape, b_shape) in found.shapes.items():
        lines.append(f"{name}: {tuple(a_shape)} in a, {tuple(b_shape)} in b")
    return lines


def _print_table(console: Console, rows: Sequence[Difference], what: str) -> None:
    shown = rows if len(rows) <= _ROWS else sorted(rows, key=lambda d: -d.relative)[:_ROWS]
    prefix = shared_prefix(d.name for d in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(f"{prefix}..." if prefix else what, overflow="fold")
    spaces = any(d.columns for d in rows)
    for title in ("norm of a", "of b", "difference", *(("columns", "rows") if spaces else ())):
        table.add_column(title, justify="right", no_wrap=True)
    rows_shown = [(d.name.removeprefix(prefix), *_cells(d, spaces=spaces)) for d in shown]
    add_rows(table, rows_shown, console.width)
    console.print()
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"The {len(shown)} of {len(rows)} that differ most")


def _cells(d: Difference, *, spaces: bool) -> list[str]:
    alike = [_phi(d.columns), _phi(d.rows)] if spaces else []
    return [f"{d.norms[0]:.3g}", f"{d.norms[1]:.3g}", f"{d.relative:.1%}", *alike]


def _phi(spaces: Subspaces | None) -> str:
    return "" if spaces is None else f"{spaces.similarity:.2f}"


def _said(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
