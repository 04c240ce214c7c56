"""The ``shrink`` command: a LoRA of a smaller rank, and what that costs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_peft.analysis.inspection import shared_prefix
from lightning_peft.analysis.inspection_report import add_rows
from lightning_peft.analysis.shrink import Shrunk, check_numbers, kept_in_all, require_room, shrink
from lightning_peft.analysis.sizes import size
from lightning_peft.cli.commands import evaluated, load
from lightning_peft.cli.report import short
from lightning_peft.formats.tensor_file import TENSORS

_ROWS = 48  # more are told by the least that is kept


def show_shrink(config: DictConfig) -> Path:
    """Writes a LoRA of a smaller rank; with ``data`` says the metrics before and after.

    Raises:
        FileNotFoundError: if there is no such adapter.
        FileExistsError: if the folder to write is there and holds something.
        ValueError: if the adapter cannot be shrunk so.
    """
    target = Path(config.to)
    require_room(target)
    check_numbers(config.r, config.energy)
    before = None if config.get("data") is None else evaluated(config)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(config.adapter)
        if not source.is_dir():
            module = load(config.adapter, config.base, check_base=config.check_base)
            source = module.save_adapter(Path(scratch) / "adapter")
        changes = shrink(source, target, config.r, config.energy)
        bytes_before = (source / TENSORS).stat().st_size
    print_shrunk(changes)
    print(f"\nexported adapter     {short(target)}")
    print(f"  its size           {size((target / TENSORS).stat().st_size)} (before: {size(bytes_before)})")
    if before is None:
        print("  its metrics        not known; data=... shows them before and after")
    else:
        after = evaluated(cast(DictConfig, OmegaConf.merge(config, {"adapter": str(target)})))
        _print_both(before, after)
    return target


def print_shrunk(changes: Sequence[Shrunk]) -> None:
    """Prints what became of each change; of many, of those of which the least is kept.

    Args:
        changes: the changes.
    """
    prefix = shared_prefix(c.place for c in changes)
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column(f"{prefix}..." if prefix else "module", overflow="fold")
    for title in ("rank", "was", "kept", "relative error"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = changes if len(changes) <= _ROWS else sorted(changes, key=lambda c: c.kept)[:_ROWS]
    rows = [(c.place.removeprefix(prefix), str(c.rank), str(c.before), *_shares(c.kept)) for c in shown]
    ranks = str(sum(c.rank for c in changes)), str(sum(c.before for c in changes))
    add_rows(table, [*rows, ("in all", *ranks, *_shares(kept_in_all(changes)))], console.width)
    console.print(table)
    if len(shown) < len(changes):
        console.print(f"The {len(shown)} of {len(changes)} modules of which the least is kept")
    console.print("kept: of the squared Frobenius norm of the change; its error relative to its norm")


def _shares(kept: float) -> tuple[str, str]:
    lost = max(0.0, 1 - kept) ** 0.5
    return f"{kept:.2%}", f"{lost:.2%}"


def _print_both(before: dict[str, float], after: dict[str, float]) -> None:
    table = Table("metric", "before", "after")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in sorted(before):
        table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    Console().print(table)
