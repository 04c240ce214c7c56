"""What an adapter holds and changes, on the screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.change import Change
from lightning_peft.analysis.inspection import Inspection, Kind, capacity_line, kinds, relative, shared_prefix
from lightning_peft.analysis.sizes import size
from lightning_peft.core.fingerprint import OF_NOTHING

_ROWS = 48  # more are counted by the kind of their module
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = ".:-=+*#@"
_WIDTH = 8  # characters of a row's singular values


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Prints what a file holds, and a line for each change; where these are many, for each kind of module.

    Args:
        found: the inspection.
        console: where to; None takes the terminal.
    """
    console = console or Console(highlight=False)
    console.print(Text(f"{found.method}  {found.path}", style="bold"), soft_wrap=True)
    console.print(_about(found))
    if found.shown:
        console.print()
        console.print(_table(found, console))
    for line in summary(found):
        console.print(Text(line))
    for note in found.notes:
        console.print(Text(note, style="yellow"))


def about(found: Inspection) -> dict[str, str]:
    """What the file is, by what each line is about.

    Args:
        found: the inspection.
    """
    name, fingerprint = found.base.get("name"), found.base.get("fingerprint")
    known = fingerprint not in (None, OF_NOTHING)
    dtypes = sorted({str(e.dtype).removeprefix("torch.") for e in found.tensors.values()})
    options = ", ".join(f"{k}={_said(v)}" for k, v in found.options.items() if v not in (None, False, {}, []))
    return {
        "base": f"{name or 'not named'}{f', fingerprint {fingerprint}' if known else ''}",
        "tensors": f"{len(found.tensors):,} with {found.numbers:,} parameters in {' and '.join(dtypes) or 'no dtype'}, "
        f"{size(found.size)} on the disk",
        "options": options or "none",
    }


def _about(found: Inspection) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for subject, said in about(found).items():
        table.add_row(subject, Text(said))
    return table


def summary(found: Inspection) -> list[str]:
    """What the changes come to, a sentence each.

    Args:
        found: the inspection.
    """
    said = []
    whole = relative(found.changes)
    if whole is not None:
        said.append(f"In all the change is {100 * whole:.3g}% of the weights that it changes (Frobenius norms)")
    ranks = capacity_line(found.changes)
    return [*said, *([ranks] if ranks else [])]


def _said(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(found: Inspection, console: Console) -> Table:
    changes = found.shown
    grouped = len(changes) > _ROWS
    names = [k.name for k in kinds(changes)] if grouped else [c.name for c in changes]
    prefix = "" if grouped else shared_prefix(names)
    ranked = any(len(c.shape) > 1 for c in changes)
    titles = ["norm", *(["of weight"] if found.has_base else []), *(["rank 99%"] if ranked else [])]
    titles += ["layers"] if grouped else ["effective", "singular values"] if ranked else []
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(f"{prefix}..." if prefix else "in each layer" if grouped else "module", overflow="fold")
    for title in titles:
        table.add_column(title, justify="left" if title == "singular values" else "right", no_wrap=True)
    bars = _BARS if console.encoding.lower().startswith("utf") else _PLAIN_BARS
    if grouped:
        rows = {kind.name: _cells_of_kind(kind) for kind in kinds(changes)}
    else:
        rows = {change.name: _cells(change, bars) for change in changes}
    lines = [(name.removeprefix(prefix), *(cells[title] for title in titles)) for name, cells in rows.items()]
    add_rows(table, lines, console.width)
    return table


def add_rows(table: Table, rows: Sequence[Sequence[Any]], width: int) -> None:
    """Adds rows that begin with a dotted name, which is broken at its dots where the line has no room.

    Args:
        table: with a heading for each cell.
        rows: the cells of each.
        width: of the terminal, in characters.
    """
    taken = sum(
        1 + max([len(str(column.header)), *(len(row[place]) for row in rows)])
        for place, column in enumerate(table.columns)
        if place
    )
    for name, *cells in rows:
        table.add_row(broken(name, max(8, width - taken - 1)), *cells)


def _cells(change: Change, bars: str) -> dict[str, str | Text]:
    """What stands in each column."""
    matrix = len(change.shape) > 1
    return {
        "norm": f"{change.norm:.3g}",
        "of weight": _percent(change.relative),
        "rank 99%": f"{change.rank} of {change.capacity}" if matrix else "",
        "effective": f"{change.effective_rank:.1f}" if matrix else "",
        "singular values": Text(sparks(change.values[: change.capacity], bars), style="cyan"),
    }


def _cells_of_kind(kind: Kind) -> dict[str, str | Text]:
    low, high = kind.ranks
    return {
        "norm": f"{kind.norm:.3g}",
        "of weight": _percent(kind.relative),
        "rank 99%": f"{low if low == high else f'{low} to {high}'} of {kind.capacity}" if kind.capacity else "",
        "layers": str(len(kind.changes)),
    }


def broken(name: str, width: int) -> str:
    r"""A dotted name on as many lines as it takes, each of them ending with a dot but the last.

    Args:
        name: the name.
        width: of a line.

    Example:
        >>> broken("layers.0.post_attention_layernorm", 28)
        'layers.0.\n  post_attention_layernorm'
    """
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name)[:-1]:
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def sparks(values: Sequence[float], bars: str = _BARS) -> str:
    """Singular values as a line of at most eight characters; beyond eight, each is the largest of some neighbours.

    Args:
        values: the largest first.
        bars: characters from low to high.
    """
    if not values or values[0] <= 0:
        return ""
    step = -(-len(values) // _WIDTH)
    tops = values[::step]
    return "".join(bars[min(len(bars) - 1, int(v / values[0] * len(bars)))] for v in tops)
