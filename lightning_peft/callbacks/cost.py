"""What a run costs: the time of a step and the memory at its peak, as numbers in the run's folder."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.analysis.run_files import COST
from lightning_peft.formats.writing import write_json

_KEPT = 1000  # intervals of which the median is taken: enough for it to be still, few enough for any run


class RecordCost(Callback):
    """Writes ``cost.json``: the median time of a step of the optimizer and the peak of a GPU's memory.

    A step's time is that between the starts of the first batches of two steps, so waiting for data is in it, and
    validations and what is saved after them are not.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._intervals: deque[float] = deque(maxlen=_KEPT)
        self._since: float | None = None
        self._step = -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._intervals.clear()
        self._since, self._step = None, -1
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # of accumulated batches the last one makes the step
            return
        now = time.perf_counter()
        if self._since is not None:
            self._intervals.append(now - self._since)
        self._since, self._step = now, trainer.global_step

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._intervals and (self.folder / COST).is_file():  # a run that goes on behind its last step
            return
        on_gpu = pl_module.device.type == "cuda"
        cost = {
            "schema": 1,
            "step_seconds": median(self._intervals) if self._intervals else None,
            "steps": trainer.global_step,
            "peak_bytes": torch.cuda.max_memory_allocated(pl_module.device) if on_gpu else None,
        }
        write_json(self.folder / COST, cost)
