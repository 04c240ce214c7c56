"""The plan on the screen: a table in a terminal, plain text elsewhere."""

from __future__ import annotations

import sys

from lightning_peft.analysis.plan import Plan


def print_plan(plan: Plan) -> None:
    """Prints a plan.

    Args:
        plan: the plan.
    """
    if not sys.stdout.isatty():
        print(plan)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.method}: {plan.summary}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    table.add_column("trains")
    for heading in ("n", "parameters", "%", "KiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        share = 100 * row.parameters / max(1, plan.total)
        numbers = (f"{row.modules:,}", f"{row.parameters:,}", f"{share:.2f}", f"{row.bytes / 1024:,.0f}")
        table.add_row(row.place, row.what, *numbers)
    console = Console()
    console.print(table)
    for note in plan.notes:
        console.print(f"[dim]{note}[/dim]")
