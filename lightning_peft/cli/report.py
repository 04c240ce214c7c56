"""What a command says when it is done."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.called import program
from lightning_peft.analysis.run_files import METRICS
from lightning_peft.analysis.sizes import size
from lightning_peft.formats.card import CARD, CURVES
from lightning_peft.formats.folder import PEFT_CONFIG
from lightning_peft.formats.serving import DEFAULT_MAX_LORA_RANK, served_rank

if TYPE_CHECKING:
    from lightning_peft.cli.sweep import Outcome
    from lightning_peft.module import PeftModule

TRAINABLE = "trainable_parameters"
_OF_ONE_METHOD = (
    "method",
    "optimizer",
    "seed",
    "ckpt_path",
    "run_dir",
    "sweep",
    "search",
)  # not to be carried into a sweep over methods


def print_training(
    monitor: str,
    score: float | None,
    best: Path | None,
    module: PeftModule,
    folder: Path,
    words: list[str],
    *,
    swept: bool = False,
) -> None:
    """Says what a run reached, where it lies, how small it is, and what to try next.

    Args:
        monitor: the metric by which the best checkpoint was chosen.
        score: its best value; None where nothing validated.
        best: the best checkpoint, or the last one.
        module: the trained module.
        folder: the exported adapter.
        words: the words of the command line that made this run.
        swept: whether it is one of a sweep.
    """
    plan = module.adapter.plan
    words = [word.removeprefix("++") for word in words]  # which the command adds by itself where Hydra wants it
    shown_best, shown_folder = short(best), short(folder)
    print()
    if score is not None:
        print(f"{_spoken(monitor)}  {score:.4f}")
    if best is not None:
        full = 3 * 4 * plan.total
        print(f"{'last' if score is None else 'best'} checkpoint      {shown_best}")
        print(
            f"  its size           {size(best.stat().st_size)} (the full model's: {size(full)} with optimizer states)"
        )
    print(f"exported adapter     {shown_folder}")
    print(f"  its size           {size(_bytes(folder))} (the full model's weights: {size(4 * plan.total)})")
    print(f"model card           {short(folder / CARD)}")
    data = [w for w in words if _group(w) == "data"]
    same_setting = [w for w in words if _group(w) not in _OF_ONE_METHOD]
    new_data = [*data, "data.predict_files=new.jsonl"] if data else []
    print(f"configuration        {short(folder.parent / 'config.yaml')}")
    print("\nNext:")
    if score is not None:
        _print_command("eval", f"adapter={shown_folder}", *data)
    elif any(word.startswith("data.test_files=") for word in data):
        _print_command("eval", f"adapter={shown_folder}", "split=test", *data)
    _print_command("predict", f"adapter={shown_folder}", "output=predictions.jsonl", *new_data)
    if module.method.mergeable:
        _print_command("export", f"adapter={shown_folder}", "to=merged", "format=merged")
    if not swept:
        _print_command("-m", "method=lora,bitfit,houlsby,prompt_tuning", "seed=1,2", *same_setting)


def _print_command(*words: str) -> None:
    print(f"  {program()} {shlex.join(words)}")


def _group(word: str) -> str:
    """The group, or the option at the top, that a word of the command line is about."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


def print_metrics(metrics: dict[str, float]) -> None:
    """A table of metrics.

    Args:
        metrics: name to value.
    """
    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def print_sweep(runs: Sequence[Outcome]) -> None:
    """A table of a sweep's runs, in their order.

    Args:
        runs: those that were trained to their end.
    """
    monitors = {run.monitor for run in runs}
    only = monitors.pop() if len(monitors) == 1 else None
    # the folder that they share would break every line of a narrow terminal
    folders = [Path(run.folder).resolve() for run in runs]
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    table = Table("run", "chosen", only or "best value", "parameters", escape(f"in {short(shared)}"))
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    table.columns[1].overflow = table.columns[4].overflow = "fold"
    console = Console()
    # a number that goes on in the next line is read as another one
    longest = max((len(word) for run in runs for word in run.chosen.split()), default=0)
    table.columns[1].min_width = min(longest, console.width // 3)
    for run, folder in zip(runs, folders, strict=True):
        trained = json.loads((folder / METRICS).read_text())[TRAINABLE]
        value = f"{run.score:.4f}" if only else f"{run.monitor} {run.score:.4f}"
        table.add_row(str(run.run), Text(run.chosen), value, f"{trained:,}", Text(str(folder.relative_to(shared))))
    print()
    console.print(table)
    if only is not None:
        print("\nNext:")
        _print_command("compare", short(shared))


def print_exported(folder: Path, form: str, module: PeftModule) -> None:
    """Says what was exported and how to load it.

    Args:
        folder: where.
        form: ``"peft"``, ``"merged"``, or whom it is for: ``"vllm"`` or ``"gguf"``.
        module: the exported module.
    """
    print(f"{folder}  {size(_bytes(folder))}")
    if form == "merged":
        print(f"load it with transformers:  {module.task.auto_class}.from_pretrained({str(folder)!r})")
    elif form == "vllm":
        print(f"serve it:  vllm serve {_base_name(module)} --enable-lora {_lora_words(folder)}")
    elif form == "gguf":
        print(f"convert it with llama.cpp's script:  python convert_lora_to_gguf.py {shlex.quote(str(folder))}")
    elif module.method.peft_type is not None:
        print(f"load it with peft:  PeftModel.from_pretrained(base_model, {str(folder)!r})")
    if form == "peft":
        print(f"load it here:  PeftModule.from_adapter({str(folder)!r})")


def _lora_words(folder: Path) -> str:
    rank = json.loads((folder / PEFT_CONFIG).read_text())["r"]
    words = ["--max-lora-rank", str(served_rank(rank))] if rank > DEFAULT_MAX_LORA_RANK else []
    return shlex.join([*words, "--lora-modules", f"{folder.name}={folder}"])


def _base_name(module: PeftModule) -> str:
    config = getattr(module.model, "config", None)
    return shlex.quote(str(getattr(config, "name_or_path", "") or "BASE"))


def _spoken(monitor: str) -> str:
    stage, _, metric = monitor.partition("/")
    stages = {"val": "validation", "test": "test", "train": "training"}
    return f"{stages.get(stage, stage)} {metric}".ljust(19)


def short(path: Path | None) -> str:
    """A path as one would type it here.

    Args:
        path: the path; None gives nothing.
    """
    if path is None:
        return ""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _bytes(folder: Path) -> int:
    """Of what is loaded: the card is for people."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name not in (CARD, CURVES))
