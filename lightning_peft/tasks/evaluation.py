"""How a LightningModule with a task is validated and tested: its loss and its metrics, over whole epochs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torchmetrics import MeanMetric, MetricCollection
from typing_extensions import override

from lightning_peft.tasks.task import InOtherUnits, Task


class EvaluatedModule(LightningModule):
    """Logs the loss and the task's metrics of validation and test, the loss as the mean over all units.

    A subclass sets ``task``, and ``metrics`` when it builds its model.
    """

    task: Task

    def __init__(self) -> None:
        super().__init__()
        self.val_loss = MeanMetric()
        self.metrics: MetricCollection | None = None

    def _outputs(self, batch: dict[str, Any]) -> Any:
        """What the model gives for a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define _outputs(batch)")

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> None:
        outputs = self._outputs(batch)
        total, count = self.task.loss(outputs, batch)
        self.val_loss.update(total / count.clamp_min(1), weight=count)
        assert self.metrics is not None
        self.task.update(self.metrics, outputs, batch)

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset_metrics()

    @override
    def on_test_epoch_start(self) -> None:
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        """Before an evaluation, not after it: what is made in inference mode cannot be updated outside of it."""
        assert self.metrics is not None
        self.val_loss.reset()
        self.metrics.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self.metrics is not None
        loss = self.val_loss.compute()
        values = {"loss": loss, **self.metrics.compute()}
        if isinstance(self.task, InOtherUnits):
            values |= self.task.from_loss(loss, values)
        for name, value in values.items():  # what concerns one class only, such as PER/f1, is too much for a bar
            # torchmetrics' MCC may be a whole number's tensor, and its BLEU one on the CPU, which NCCL refuses
            number = torch.as_tensor(value, dtype=torch.float32, device=self.device)
            self.log(f"{stage}/{name}", number, prog_bar="/" not in name, sync_dist=True)
