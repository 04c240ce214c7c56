"""A validation at the end of training, also where that lies within an epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class ValidateAtEnd(Callback):
    """Has a run validate that ``max_steps`` ends within an epoch.

    Lightning validates where an epoch ends, so that a run of fewer steps would have no metric and no best checkpoint.
    A stop that is asked for, as early stopping does it, is what it validates before.
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
