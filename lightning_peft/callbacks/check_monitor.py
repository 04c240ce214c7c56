"""Whether the metric that checkpoints are chosen by is there, before any training."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from typing_extensions import override

from lightning_peft.core.problems import nearest
from lightning_peft.data.rows import RowDataModule


class CheckMonitor(Callback):
    """Refuses a name that no validation logs, once the few batches before training have shown what is logged.

    Lightning itself finds out when the first checkpoint is due, after an epoch. Where all rows are trained on and none
    validates, there is no best checkpoint: that of the last epoch is kept.

    Args:
        monitor: the metric's name; only one of ``val/`` can be known by then.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        validates = not isinstance(data, RowDataModule) or "validation" in data.splits
        if stage != "fit" or validates or not self.monitor.startswith("val/"):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ModelCheckpoint | EarlyStopping) or callback.monitor != self.monitor:
                continue
            if isinstance(callback, EarlyStopping) or callback.save_top_k not in (0, 1):
                raise ValueError(
                    f"{type(callback).__name__} goes by {self.monitor}, but no rows validate; give validation_files or "
                    "a validation_fraction above 0"
                )
            callback.monitor = None

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if self.monitor.startswith("val/") and logged and self.monitor not in logged:
            raise ValueError(f"monitor={self.monitor} is logged by no validation{nearest(self.monitor, logged)}")
