"""Rebuilding a user's LightningModule, adapters included, from a checkpoint that holds what trained."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule

from lightning_peft.callbacks.adaptation import record_of
from lightning_peft.callbacks.peft_callback import Pending, await_modules
from lightning_peft.methods.config import method_from_config

T = TypeVar("T", bound=LightningModule)


def load_from_checkpoint(cls: type[T], path: str | Path, map_location: Any = "cpu", **kwargs: Any) -> T:
    """Builds the module, adapts it as the checkpoint says, and loads what was trained.

    The base comes from the module itself, as for a fresh run: its weights are not in the checkpoint.

    Args:
        cls: the module's class.
        path: a checkpoint made with `PeftCallback`.
        map_location: where the tensors go.
        **kwargs: for ``cls``; they stand above the checkpoint's saved hyperparameters.

    Returns:
        The module, on the CPU, in the mode in which it was built.

    Raises:
        ValueError: if the checkpoint holds no adapter, or belongs to another base.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    record = record_of(checkpoint)
    ((name, method),) = record["methods"].items()
    pending = Pending(method_from_config(method), record["model"], name)

    # Lightning's own loading calls `configure_model` after building and before loading: a class that arranges
    # the adaptation when it is made needs nothing else.
    def build(self: LightningModule, *args: Any, **inner: Any) -> None:
        cls.__init__(self, *args, **inner)
        self.__class__ = cls
        await_modules(self, pending)

    build.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined]  # which Lightning reads
    maker = cast(type[T], type(cls.__name__, (cls,), {"__init__": build}))
    return maker.load_from_checkpoint(path, map_location=map_location, weights_only=True, **kwargs)
