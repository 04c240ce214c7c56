"""Runs that are killed and resumed, each in a forked process, compared with one that nobody disturbed.

``python kill_and_resume.py MODEL TEXTS FOLDER CASE SEED...`` prints a line of JSON for each seed: where the run was
killed, from which step it went on, and what differs in the end.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import omegaconf  # noqa: F401  # which a Trainer imports when it first saves
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lightning_peft import AdaLoRA, LoRA, PeftModule, Selective, TextDataModule

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "dropout": (lambda: LoRA(r=2, lora_dropout=0.3), {}, {}),
    "adalora": (lambda: AdaLoRA(target_r=1, init_r=3, tinit=2, tfinal=2, lora_dropout=0.2), {}, {}),
    "unfreezing": (lambda: Selective(unfreeze_until=0.8, keep_originals=False), {}, {"val_check_interval": 4}),
    "workers": (lambda: LoRA(r=2, lora_dropout=0.3), {"num_workers": 2}, {"accumulate_grad_batches": 2}),
}
"""Method, options of the data, options of the trainer."""


class Lines(Logger):
    """Writes what is logged as lines of JSON, at once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    name = version = "lines"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One line.

        Args:
            metrics: what is logged.
            step: when.
        """
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Death(L.Callback):
    """Ends this process without a word after so many calls of a function, counted over the training or in its saves.

    Args:
        folder: where the step is noted from which the run goes on.
        after: calls; None lives, and counts.
        saving: whether only calls that save a checkpoint count.
    """

    def __init__(self, folder: Path, after: int | None = None, saving: bool = False) -> None:
        self.folder, self.after, self.saving, self.calls, self.saved = folder, after, saving, 0, 0
        self.inside = False
        self.process = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count."""
        self.process = os.getpid()
        with (self.folder / "began.txt").open("a") as file:
            file.write(f"{trainer.global_step}\n")
        save = trainer.save_checkpoint

        def counted(*args: Any, **kwargs: Any) -> None:
            self.inside = True
            save(*args, **kwargs)
            self.inside = False

        trainer.save_checkpoint = counted  # type: ignore[method-assign]
        sys.setprofile(self.count)

    def count(self, frame: Any, event: str, argument: Any) -> None:
        """One call more."""
        if os.getpid() != self.process:  # a worker of the data
            sys.setprofile(None)
            return
        self.calls += 1
        self.saved += self.inside
        if self.after is not None and (self.saved if self.saving else self.calls) >= self.after:
            os.kill(self.process, signal.SIGKILL)


def train(folder: Path, model: str, texts: str, case: str, death: Death, resume: bool) -> dict[str, Any]:
    """A run to its end; what it came to."""
    method, data, options = CASES[case]
    L.seed_everything(0, verbose=False)
    module = PeftModule(model, method(), scheduler={"name": "linear", "warmup": 0.3})
    keep = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    callbacks = [
        ModelCheckpoint(filename="best", monitor="val/loss", mode="min", **keep),
        ModelCheckpoint(filename="last", every_n_train_steps=2, **keep),
        LearningRateMonitor("step"),
        death,
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=3,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=Lines(folder / "metrics.jsonl"),
        **quiet,
        **options,
    )
    if (folder / "checkpoints" / "last.ckpt").exists():
        torch.rand(5)  # what is not in the checkpoint is not as it was
    seen = TextDataModule(train_files=texts, batch_size=4, max_length=24, **data)
    trainer.fit(module, seen, ckpt_path="last" if resume else None, weights_only=True)
    sys.setprofile(None)
    best = callbacks[0]
    return {
        "state": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "record": module.adapter.tree.record.training.to_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "best": (float(best.best_model_score), torch.load(best.best_model_path, weights_only=True)["global_step"]),
        "random": torch.get_rng_state(),
        "calls": death.calls,
        "saved": death.saved,
    }


def forked(work: Callable[[], None]) -> int:
    """The status of a process of its own that does the work."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Where two nested containers of tensors and plain values are not the same to the bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(found, expected) else [name]
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{name}: {sorted(map(str, found.keys() ^ expected.keys()))}"]
        return [d for k in expected for d in differences(found[k], expected[k], f"{name}/{k}")]
    return [] if found == expected else [f"{name}: {found} instead of {expected}"]


def logged(path: Path) -> dict[tuple[int, str], list[float]]:
    """All that was logged, by step and name; several values where a step was made twice."""
    found: dict[tuple[int, str], list[float]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            found.setdefault((step, name), []).append(value)
    return found


def ended(place: Path, *arguments: Any) -> int:
    """How a process ended that trained, with the result in ``end.pt`` where it came to one."""
    return forked(lambda: torch.save(train(place, *arguments), place / "end.pt"))


def killed_and_resumed(place: Path, model: str, texts: str, case: str, seed: int, counted: dict[str, int]) -> list[int]:
    """Runs until one comes to its end: the first two die, one of them anywhere and one while it saves."""
    chance = random.Random(seed)
    plan = [(chance.randint(1, counted["calls"]), False), (chance.randint(1, counted["saved"]), True)]
    chance.shuffle(plan)
    ends: list[int] = []
    for after, saving in [*plan, (None, False)]:
        if 0 not in ends:
            ends.append(ended(place, model, texts, case, Death(place, after, saving), bool(ends)))
    return ends


def main(model: str, texts: str, folder: Path, case: str, seeds: list[int]) -> None:
    """Prints a line for each seed."""
    labels = {"name": "text_classification", "labels": ["even", "odd"]}
    PeftModule(model, LoRA(r=2), labels).configure_model()  # what is imported late is imported once for all
    (folder / "whole").mkdir(parents=True)
    assert ended(folder / "whole", model, texts, case, Death(folder / "whole"), False) == 0
    expected = torch.load(folder / "whole" / "end.pt", weights_only=True)
    metrics = logged(folder / "whole" / "metrics.jsonl")
    counted = {name: expected.pop(name) for name in ("calls", "saved")}
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        ends = killed_and_resumed(place, model, texts, case, seed, counted)
        found = torch.load(place / "end.pt", weights_only=True)
        wrong = differences({name: found[name] for name in expected}, expected)
        seen = logged(place / "metrics.jsonl")
        wrong += [
            f"{key}: {seen[key]} instead of {metrics[key]}" for key in seen if set(seen[key]) != set(metrics[key])
        ]
        # Lightning writes a step's line after the checkpoint of that step, so a death between the two takes the line
        untold = {int(step) - 1 for step in (place / "began.txt").read_text().split()}
        wrong += [f"{key} was never logged" for key in metrics if key not in seen and key[0] not in untold]
        print(json.dumps({"seed": seed, "ends": ends, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], [int(seed) for seed in sys.argv[5:]])
