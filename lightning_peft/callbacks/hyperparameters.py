"""What a run is made of, for its loggers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_peft.data.rows import RowDataModule

_OF_TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def log_hyperparameters(trainer: Trainer, module: Mapping[str, Any]) -> None:
    """Tells a trainer's loggers what the run is made of, so that runs can be sorted and compared by it.

    Lightning would log what the module keeps for its checkpoints, without the data, the seed and the trainer.

    Args:
        trainer: the trainer, at the beginning of a fit.
        module: what the LightningModule is made of, in plain values.
    """
    if not trainer.loggers:
        return
    data = getattr(trainer, "datamodule", None)
    found = {
        **module,
        "data": _options(data) if isinstance(data, RowDataModule) else type(data).__name__,
        "trainer": {name: getattr(trainer, name) for name in _OF_TRAINER},
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(found)


def _options(data: RowDataModule) -> dict[str, Any]:
    """The options that a data module was given, by their names."""
    known = {**{f"{split}_files": files for split, files in data.files.items()}, **vars(data)}
    options = {name: known[name] for name in inspect.signature(type(data)).parameters}
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str | dict) else str(value)
