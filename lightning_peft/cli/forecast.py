"""The ``forecast`` command: what a training step takes, on which cards it fits, and how large a batch may be."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.gpus import REACHED, RESERVE, Gpu, gpus_named
from lightning_peft.analysis.largest_batch import MOST, largest_batches
from lightning_peft.analysis.sizes import size
from lightning_peft.analysis.step_cost import operations
from lightning_peft.analysis.step_memory import StepMemory
from lightning_peft.cli.plan import require_sizes, task_for
from lightning_peft.cli.targets import made
from lightning_peft.core.method import Method, require_method
from lightning_peft.forecast import imitated_step, spoken_batch
from lightning_peft.formats.card_sections import changed_options
from lightning_peft.tasks.base_model import BaseModel


def show_forecast(config: DictConfig) -> None:
    """Shows what a training step takes, by parts, and how it fits on GPUs, from the model's configuration alone.

    Raises:
        ValueError: if a number is below 1, a card or the precision is unknown, or the step cannot be counted.
    """
    require_sizes(config)
    options = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    cards = gpus_named(options["gpus"])
    method = made(config.method)
    require_method(method)
    base, (task, note) = BaseModel.of(options["model"]), task_for(options["task"])
    rows, length = config.batch_size, min(config.length, base.positions() or config.length)
    console = Console(highlight=False)
    with imitated_step(base, task, method, options["optimizer"], config.precision) as step:
        computed = step.operations(rows, length)
        found = {rows: step.memory(rows, length)}
        # at once: the largest batch takes a count of several steps, minutes for models of many layers
        console.print(Text(f"A step of {spoken_batch(task, rows, length)} in {config.precision}, {_spoken(method)}:"))
        console.print(_parts(found[rows], computed))
        console.print()

        def peak(count: int) -> int:
            if count not in found:
                found[count] = step.memory(count, length)
            return found[count].peak

        largest = largest_batches(peak, [card.memory - RESERVE for card in cards], rows)
    seconds = [card.seconds(computed, config.precision) for card in cards]
    console.print(_fits(found[rows].peak, cards, largest, seconds))
    console.print(
        f"Beside a step's tensors {size(RESERVE)} are kept for CUDA; times are of {REACHED:.0%} of a card's best rate."
        + (f" Counted with {note}." if note else ""),
        style="dim",
    )


def _spoken(method: Method) -> str:
    """The method with the options that are not the class's own, as presets of one class differ in these alone."""
    told = ", ".join(f"{name}={value}" for name, value in changed_options(method).items())
    return type(method).__name__ + (f" ({told})" if told else "")


def _parts(step: StepMemory, computed: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column("")
    table.add_column("", justify="right")
    for name, count in (
        ("weights that rest", step.weights),
        ("weights that train", step.trained),
        ("gradients", step.gradients),
        ("optimizer's states", step.optimizer),
        ("kept for the backward pass", step.kept),
        ("logits, at the peak", step.logits),
        ("peak", step.peak),
    ):
        if count:
            table.add_row(f"  {name}", size(count), style="bold" if name == "peak" else "")
    table.add_row("  operations", operations(computed))
    return table


def _fits(peak: int, cards: list[Gpu], largest: list[int], seconds: list[float]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("GPU")
    for name in ("memory", "fits", "to spare", "largest batch", "a step"):
        table.add_column(name, justify="right", no_wrap=True)
    for card, most, taken in zip(cards, largest, seconds, strict=True):
        spare = card.memory - RESERVE - peak
        table.add_row(
            card.name,
            size(card.memory),
            "yes" if spare >= 0 else "no",
            size(spare) if spare >= 0 else f"-{size(-spare)}",
            f"{MOST:,} or more" if most == MOST else f"{most:,}",
            _seconds(taken) if spare >= 0 else "",
            style="" if spare >= 0 else "dim",
        )
    return table


def _seconds(count: float) -> str:
    return f"{count:.1f} s" if count >= 1 else f"{1000 * count:.3g} ms"
