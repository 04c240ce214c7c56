"""What a model card tells of a training, noted while it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_peft.analysis.data_summary import DataSummary
from lightning_peft.callbacks.epoch_lines import numbers_of
from lightning_peft.callbacks.show_data import ShowData
from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.tree import Record
from lightning_peft.data.rows import RowDataModule
from lightning_peft.data.summary import summarise
from lightning_peft.formats.card_sections import installed_versions
from lightning_peft.formats.hub import origin_of
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.handle import Adapter

_LOSS = "train/loss"


class RecordTraining(Callback):
    """Notes losses, metrics and settings of a training with the adapter that it trains.

    The notes go where the adapter goes: into checkpoints, from which a resumed run goes on with them, and into the
    folder and onto the model card when it is exported. Losses stay on the device until many are fetched at once.

    Args:
        monitor: the metric that matters where no checkpoints are chosen by one.
        schedule: what the learning rate's schedule is called, where the scheduler's class does not say it.
    """

    def __init__(self, monitor: str | None = None, schedule: str | None = None) -> None:
        self.monitor = monitor
        self.schedule = schedule
        self.data: Any = None
        self.record: TrainingRecord | None = None
        self._last = 0
        self._known: set[str] = set()
        self._judged: set[str] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapters = _adapters(pl_module)
        before: TrainingRecord | None = next((a.training for a in adapters if a.training is not None), None)
        self._last = step = trainer.global_step
        if before is None or step == 0:
            record = TrainingRecord(earlier=0 if before is None else before.earlier + before.step)
        else:
            record = before
            record.up_to(step + 1)  # with the losses so far of a step that is not finished
            record.step = step
        record.setup = [*_task(pl_module), *self._setup(trainer)]
        record.versions = installed_versions()
        record.monitor = self._monitor(trainer)
        record.epoch_steps = _epoch_steps(trainer)
        self.data = getattr(trainer, "datamodule", None)
        summary = next((c.summary for c in _callbacks(trainer) if isinstance(c, ShowData)), None)
        record.data = record.data if summary is None else told_of(summary)
        self.record = record
        for adapter in adapters:
            if adapter.resting is None:
                adapter.training = record

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a loss that is logged is the mean that one reads elsewhere; the returned one may be scaled for its gradients
        loss = trainer.callback_metrics.get(_LOSS)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        assert self.record is not None
        self.record.step = step = trainer.global_step
        ended, self._last = step > self._last, step
        if isinstance(loss, Tensor):
            self.record.add_loss(step if ended else step + 1, loss)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known = set(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert self.record is not None
        found = numbers_of(trainer)
        self._judged |= found.keys() - self._known
        self.record.add_metrics(trainer.global_step, {n: v for n, v in found.items() if n in self._judged})

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for adapter in _adapters(pl_module):
            if adapter.training is not None:
                adapter.training.add_metrics(adapter.training.step, numbers_of(trainer))

    def describe_data(self, adapter: Adapter) -> None:
        """Adds to the notes what the adapter was trained on, if that is one of our data modules and not told yet.

        Args:
            adapter: the adapter, after its training here.
        """
        record = adapter.tree.record.training
        if record is not None and record.data is None and isinstance(self.data, RowDataModule):
            record.data = told_of(summarise(self.data, examples=0))

    def _monitor(self, trainer: Trainer) -> str | None:
        chosen = getattr(trainer.checkpoint_callback, "monitor", None)
        return self.monitor if chosen is None else str(chosen)

    def _setup(self, trainer: Trainer) -> list[list[str]]:
        """The settings by their names, those that are off left out."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = dict.fromkeys(f"{g.get('initial_lr', g['lr']):g}" for g in groups)
        decays = dict.fromkeys(f"{g['weight_decay']:g}" for g in groups if g.get("weight_decay"))
        schedules = dict.fromkeys(type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs)
        clipped = trainer.gradient_clip_val
        found = {
            "optimizer": ", ".join(dict.fromkeys(type(o).__name__ for o in trainer.optimizers)),
            "learning rate": ", ".join(rates),
            "schedule": self.schedule or ", ".join(schedules),
            "weight decay": ", ".join(decays),
            "batch size": _batch_size(trainer),
            "gradient clipping": f"{clipped:g} ({trainer.gradient_clip_algorithm or 'norm'})" if clipped else "",
            "precision": str(trainer.precision),
            "devices": str(trainer.world_size) if trainer.world_size > 1 else "",
            "seed": os.environ.get("PL_GLOBAL_SEED", ""),
        }
        return [[name, words] for name, words in found.items() if words]


def _task(module: LightningModule) -> list[list[str]]:
    """One of our tasks, with its options that are numbers, such as DPO's beta."""
    config: dict[str, Any] = getattr(getattr(module, "task", None), "to_config", dict)()
    if "name" not in config:
        return []
    numbers = [f"{k} {v:g}" for k, v in config.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return [["task", f"{config['name']} ({', '.join(numbers)})" if numbers else str(config["name"])]]


def told_of(summary: DataSummary) -> dict[str, Any]:
    """What a card tells of the data, in plain values: no example, and no path.

    Args:
        summary: the summary.
    """
    splits = {
        name: {
            "rows": split.rows,
            "streamed": split.streamed,
            "tokens": None if split.tokens is None else split.tokens.all,
            "supervised": None if split.tokens is None else split.tokens.supervised,
            "labels": split.labels,
            "spreads": {
                part: {"median": spread.median, "largest": spread.largest, "unit": spread.unit}
                for part, spread in split.spreads.items()
            },
        }
        for name, split in summary.splits.items()
    }
    return {"seen_as": summary.seen_as, "splits": splits, **origin_of(summary.origin)}


def _adapters(module: LightningModule) -> list[Record]:
    roots = [adapters_of(m) for m in module.modules()]
    return [tree.record for root in roots if root is not None for tree in root.trees.values()]


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _epoch_steps(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    if not isinstance(batches, int):
        return None
    return max(1, -(-batches // trainer.accumulate_grad_batches))


def _batch_size(trainer: Trainer) -> str:
    """Rows in a step of the optimizer, and how they come together."""
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    size = size or getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if not isinstance(size, int):
        return ""
    parts = {"accumulated": trainer.accumulate_grad_batches, "devices": trainer.world_size}
    more = [f"{n} {what}" for what, n in parts.items() if n > 1]
    whole = size * trainer.accumulate_grad_batches * trainer.world_size
    return f"{whole} ({' x '.join([f'{size} in a batch', *more])})" if more else str(size)
