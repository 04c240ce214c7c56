"""Training a classifier with LoRA: examples a second of the command's default job, beside the tools that people use.

    python benchmarks/classification.py

The embedded model and data, LoRA r=8 on all linear layers, batches of 32 rows of at most 64 tokens, in turns in one
process. ``trainer`` is transformers' Trainer with PEFT, ``lightning`` a plain LightningModule with PEFT: both pad to
the longest row of batches that are drawn at random, as their defaults do. With ``grouped`` they get the batches of
similar length that our job makes, so that losses can be compared too. The steps of an epoch are timed, with what a
tool does around them, from the first batch on; validation is not. The first round warms up. The figures go to
``benchmarks/results/classification.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from typing_extensions import override

from lightning_peft import PeftModule, TextClassification, TextDataModule
from lightning_peft.cli.commands import monitor_as_the_task_says
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.base_source import resolve

CONF = Path(__file__).parents[1] / "conf"
BATCH, RATE, WARMUP = 32, 2e-3, 0.06
RUNS = ("ours", "trainer", "lightning", "trainer, grouped", "lightning, grouped")


class Steps:
    """How long they took together, and their losses."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.losses: list[float] = []

    def begin(self) -> None:
        """Before the first step: everybody's dropout draws the same."""
        torch.manual_seed(1)
        self.began = time.perf_counter()

    def add(self, loss: Any) -> None:
        """After a step of the optimizer."""
        self.losses.append(float(loss))
        self.ended = time.perf_counter()

    @property
    def speed(self) -> float:
        """Examples a second."""
        return BATCH * len(self.losses) / (self.ended - self.began)


class Noted(L.Callback):
    """Notes the steps of a Lightning Trainer, and what ours begins with."""

    def __init__(self, start: Path | None = None) -> None:
        self.steps, self.start = Steps(), start

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.start is not None and not self.start.exists():
            assert isinstance(pl_module, PeftModule)
            pl_module.adapter.save(self.start)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.steps.begin()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.add(outputs["loss"])


def ours(folder: Path, examples: int) -> Steps:
    """The job of ``lightning-peft``, with its callbacks and its logger."""
    run = Path(tempfile.mkdtemp(dir=folder))
    words = [f"data.limit={examples}", "trainer.max_epochs=1", "trainer.limit_val_batches=1", f"run_dir={run}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*words, "callbacks.interrupt=null"])
    monitor_as_the_task_says(config)
    L.seed_everything(config.seed, verbose=False)
    options: Any = OmegaConf.to_container(config)
    parts = (options[name] for name in ("model", "method", "task", "optimizer", "scheduler"))
    noted = Noted(folder / "start")
    callbacks = [*(instantiate(c) for c in config.callbacks.values() if c is not None), noted]
    loggers = [instantiate(c) for c in config.logger.values()]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, enable_progress_bar=False)
    trainer.fit(PeftModule(*parts), instantiate(config.data))
    return noted.steps


class Peers:
    """What the other tools begin with: the same rows, the same weights.

    Args:
        folder: where ours has left its start.
        examples: rows.
    """

    def __init__(self, folder: Path, examples: int) -> None:
        self.folder = folder
        self.tokenizer: Any = BaseModel().load_tokenizer()
        self.task, data = TextClassification(), TextDataModule(limit=examples)
        data.connect(self.task, self.tokenizer)
        data.setup("fit")
        self.rows = data.features("train").select_columns(["input_ids", "labels"])
        self.order = [i for batch in data.train_dataloader().batch_sampler.sampler.batches() for i in batch]
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.steps = math.ceil(len(self.rows) / BATCH)

    def sampler(self, *, grouped: bool) -> Any:
        """The rows at random, or in the order in which ours takes them."""
        return self.order if grouped else RandomSampler(self.rows)

    def model(self) -> Any:
        """The base with PEFT's LoRA."""
        from peft import PeftModel

        labels = len(self.task.labels or ())
        base = AutoModelForSequenceClassification.from_pretrained(
            resolve(BaseModel().name_or_path)[0], num_labels=labels
        )
        return PeftModel.from_pretrained(base, str(self.folder / "start"), is_trainable=True)

    def trainer(self, *, grouped: bool) -> Steps:
        """Transformers' Trainer."""
        steps, sampler = Steps(), self.sampler(grouped=grouped)

        class Noting(Trainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return sampler

            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                if not steps.losses:
                    steps.begin()
                self.loss_of_step: Tensor = super().training_step(*args, **kwargs)
                return self.loss_of_step

        class Ended(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                steps.add(run.loss_of_step)

        options: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
        schedule = {"lr_scheduler_type": "linear", "warmup_steps": math.ceil(WARMUP * self.steps)}
        rate = {"learning_rate": RATE, "num_train_epochs": 1, "max_grad_norm": 0.0}
        arguments = TrainingArguments(
            str(self.folder / "out"), per_device_train_batch_size=BATCH, **options, **schedule, **rate
        )
        run = Noting(self.model(), arguments, self.collate, self.rows, callbacks=[Ended()])
        run.train()
        return steps

    def lightning(self, *, grouped: bool) -> Steps:
        """The LightningModule that one would write."""
        model, steps = self.model(), self.steps

        class Classifier(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model.train()  # transformers loads models for evaluation, and Lightning leaves them so

            @override
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss: Tensor = self.model(**batch).loss
                self.log("train_loss", loss)
                return loss

            @override
            def configure_optimizers(self) -> Any:
                trained = [p for p in self.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
                schedule = get_scheduler("linear", optimizer, math.ceil(WARMUP * steps), steps)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        noted = Noted()
        loader = DataLoader(self.rows, BATCH, sampler=self.sampler(grouped=grouped), collate_fn=self.collate)
        options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=1, callbacks=[noted], default_root_dir=self.folder, **options)
        trainer.fit(Classifier(), loader)
        return noted.steps


def measure(folder: Path, examples: int, repeats: int) -> dict[str, list[Steps]]:
    """Every run in every round; the first round warms up."""
    rounds: dict[str, list[Steps]] = {name: [] for name in RUNS}
    ours(folder, examples)  # leaves its start for the others
    peers = Peers(folder, examples)
    for turn in range(repeats + 1):
        for name in RUNS if turn % 2 else RUNS[::-1]:
            tool, _, grouped = name.partition(", ")
            run = ours(folder, examples) if tool == "ours" else getattr(peers, tool)(grouped=bool(grouped))
            if turn:
                rounds[name].append(run)
    return rounds


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=640, help="a multiple of 32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "classification.json")
    options = parser.parse_args()
    if options.examples % BATCH:
        parser.error(f"--examples must be a multiple of {BATCH}, so that all get the same batches")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        rounds = measure(Path(scratch), options.examples, options.repeats)
    table: dict[str, Any] = {"examples": options.examples, "threads": options.threads}
    print(f"{'':<20}{'examples/s':>12}{'ours is':>10}{'spread':>16}{'losses':>10}")
    for name, runs in rounds.items():
        ratios = sorted(a.speed / b.speed for a, b in zip(rounds["ours"], runs, strict=True))
        losses = zip(rounds["ours"][0].losses, runs[0].losses, strict=True)
        same = name == "ours" or name.endswith("grouped")
        table[name] = row = {
            "examples_per_second": round(statistics.median(run.speed for run in runs), 1),
            "times_as_fast": round(statistics.median(ratios), 2),
            "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
            "largest_difference_of_losses": max(abs(a - b) for a, b in losses) if same else None,
        }
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        apart = f"{row['largest_difference_of_losses']:.1e}" if same else ""
        print(f"{name:<20}{row['examples_per_second']:>12}{row['times_as_fast']:>9}x{spread:>16}{apart:>10}")
    options.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
