"""One line an epoch, for runs that nobody watches."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class EpochLines(Callback):
    """Prints the metrics of each epoch where no progress bar is shown: logs, pipes, batch jobs."""

    def __init__(self) -> None:
        self._began = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        metrics = numbers_of(trainer)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        passed = time.perf_counter() - self._began
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"  # -1: until max_steps
        print(f"epoch {trainer.current_epoch + 1}{last}  {passed:.0f} s  {shown}", flush=True)


def numbers_of(trainer: Trainer) -> dict[str, float]:
    """The metrics that are one number; those of one class among many are left to the loggers.

    Args:
        trainer: the trainer, with the metrics of its last step and validation.
    """
    return {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1 and k.count("/") < 2}
