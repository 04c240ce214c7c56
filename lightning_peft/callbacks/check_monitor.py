"""Whether the metric that checkpoints are chosen by is there, before any training."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.core.problems import nearest


class CheckMonitor(Callback):
    """Refuses a name that no validation logs, once the few batches before training have shown what is logged.

    Lightning itself finds out when the first checkpoint is due, after an epoch.

    Args:
        monitor: the metric's name; only one of ``val/`` can be known by then.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if self.monitor.startswith("val/") and logged and self.monitor not in logged:
            raise ValueError(f"monitor={self.monitor} is logged by no validation{nearest(self.monitor, logged)}")
