"""The plan on the screen: a table in a terminal that is wide enough, plain text elsewhere."""

from __future__ import annotations

import sys
import textwrap

from lightning_peft.analysis.plan import Plan
from lightning_peft.analysis.sizes import size


def print_plan(plan: Plan) -> None:
    """Prints a plan.

    Args:
        plan: the plan.
    """
    if not sys.stdout.isatty():
        print(plan)
        if plan.beginning:
            print(f"  {plan.beginning}")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    heading = f"{plan.method}: {plan.summary}"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("module", "trains"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "parameters", "%", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        share = 100 * row.parameters / max(1, plan.total)
        numbers = (f"{row.modules:,}", f"{row.parameters:,}", f"{share:.2f}", size(row.bytes))
        table.add_row(Text(row.place), row.what, *numbers)
    console = Console()
    console.print(Text(heading, style="bold"))
    if Measurement.get(console, console.options.update_width(sys.maxsize), table).maximum <= console.width:
        console.print(table)
    else:
        print(_narrow(plan, console.width))
    for note in filter(None, (plan.storage, *plan.notes, plan.beginning)):
        console.print(Text(note, style="dim"))


def _narrow(plan: Plan, width: int) -> str:
    """A place and below it what trains there: names stay whole, so that they can be copied."""
    lines: list[str] = []
    for row in plan.rows:
        what = f"{row.what}, {row.modules:,} x, {row.parameters:,} parameters, {size(row.bytes)}"
        lines += [row.place, textwrap.fill(what, width, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(lines)
