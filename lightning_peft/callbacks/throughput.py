"""How fast a run goes, in what a language model counts."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_peft.tasks.padding import IGNORED


class Throughput(Callback):
    """Logs the learning rate, tokens a second and the supervised tokens so far, for loggers and progress bars.

    Neither padding nor the time of a validation, and of what is saved or written after it, is counted. The counts stay
    on the device between two steps that are logged, so that a GPU is not waited for.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._supervised: Tensor | int = 0
        self._all_supervised = 0
        self._since = 0.0
        self._paused: float | None = None
        self._last = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens = self._supervised = 0
        self._last, self._since, self._paused = trainer.global_step, time.perf_counter(), None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens, supervised = token_counts(batch)
        self._tokens, self._supervised = self._tokens + tokens, self._supervised + supervised
        step = trainer.global_step
        if (
            step == self._last or step % cast(Any, trainer).log_every_n_steps
        ):  # of accumulated batches the last one makes a step
            return
        self._last, now = step, time.perf_counter()
        self._all_supervised += int(self._supervised)
        shown = {f"lr/{i}" if i else "lr": o.param_groups[0]["lr"] for i, o in enumerate(trainer.optimizers)}
        if int(self._tokens):
            shown["train/tokens_per_second"] = int(self._tokens) / (now - self._since)
        if self._all_supervised:
            shown["train/supervised_tokens"] = float(self._all_supervised)
        pl_module.log_dict(shown, prog_bar=True, batch_size=1)
        self._tokens, self._supervised, self._since = 0, 0, now

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"supervised": self._all_supervised + int(self._supervised)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._all_supervised = state_dict["supervised"]


def token_counts(batch: Any) -> tuple[Tensor | int, Tensor | int]:
    """Tokens of a batch without padding, and those of them that the loss counts on.

    Args:
        batch: tensors by name. Names that end in ``attention_mask`` count tokens, those that end in ``labels`` and are
            ``(batch, tokens)`` supervised ones; what has neither counts nothing.
    """
    if not isinstance(batch, dict):
        return 0, 0
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() == 2}
    masks = [v for k, v in tensors.items() if k.endswith("attention_mask")]
    labels = [v for k, v in tensors.items() if k.endswith("labels") and not torch.is_floating_point(v)]
    tokens: Tensor | int = sum((m.sum() for m in masks), start=0)
    supervised: Tensor | int = sum(((v != IGNORED).sum() for v in labels), start=0)
    return tokens, supervised
