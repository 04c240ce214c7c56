"""Rebuilding a user's LightningModule, adapters included, from a checkpoint that holds what trained."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft.callbacks.adaptation import record_of
from lightning_peft.callbacks.peft_callback import Pending, await_modules
from lightning_peft.core.generated import original_class
from lightning_peft.formats.allocation import made_for
from lightning_peft.formats.reading import naming, read_checkpoint
from lightning_peft.methods.config import method_from_config

T = TypeVar("T", bound=LightningModule)


def load_from_checkpoint(
    cls: type[T], path: str | Path, map_location: Any = "cpu", *, check_base: bool = True, **kwargs: Any
) -> T:
    """Builds the module, adapts it as the checkpoint says, and loads what was trained.

    The base comes from the module itself, as for a fresh run: its weights are not in the checkpoint. The module is
    built as a Trainer builds it: ``__init__``, ``setup("predict")``, ``configure_model``. A ``setup`` that wants more
    than there is here, such as a Trainer or data, may fail where all that was saved finds its place nevertheless.

    Args:
        cls: the module's class.
        path: a checkpoint made with `PeftCallback`.
        map_location: where the tensors go.
        check_base: refuse a base with another fingerprint than the one that the checkpoint was made on.
        **kwargs: for ``cls``; they stand above the checkpoint's saved hyperparameters.

    Returns:
        The module, on the CPU, in the mode in which it was built. If the whole module is the base, its class is a
        generated subclass of ``cls``, as that of every adapted module: ``isinstance`` tells what it is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or of a later version, holds no adapter, or belongs to another base.
        RuntimeError: if its tensors are not those that the module expects.
    """
    cls = original_class(cls)
    checkpoint = read_checkpoint(Path(path))
    with naming(Path(path)):
        record = record_of(checkpoint)
    if len(record["methods"]) != 1:
        raise ValueError(
            f"{path} holds the adapters {sorted(record['methods'])}, and load_from_checkpoint rebuilds one; build the "
            "module, adapt() it by each of them in the same order, and resume with ckpt_path"
        )
    ((name, method),) = record["methods"].items()
    with naming(Path(path)):
        pending = Pending(method_from_config(method), record["model"], name, check_base=check_base)

    failures: list[Exception] = []

    # Lightning's own loading calls `configure_model` after building and before loading, and no `setup`: a class
    # that calls it and arranges the adaptation when it is made needs nothing else.
    def build(self: LightningModule, *args: Any, **inner: Any) -> None:
        cls.__init__(self, *args, **inner)
        self.__class__ = cls
        try:
            self.setup("predict")
        except Exception as error:
            # whether it was to build something, only the loading shows
            failures.append(error)
        await_modules(self, pending)

    build.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined]  # which Lightning reads
    maker = cast(type[T], type(cls.__name__, (cls,), {"__init__": build}))
    try:
        with made_for(_numbers(checkpoint)):
            module = maker.load_from_checkpoint(path, map_location=map_location, weights_only=True, **kwargs)
    except Exception as error:
        error.add_note(f"So it was when {path} was loaded.")
        for failure in failures:
            error.add_note(f"Before that, {cls.__name__}.setup('predict') failed without a Trainer: {failure!r}")
        raise
    for failure in failures:
        rank_zero_warn(
            f"{cls.__name__}.setup('predict') failed without a Trainer: {failure!r}. All that was saved found its "
            "place; what else setup sets is missing until a Trainer calls it."
        )
    return module


def _numbers(checkpoint: dict[str, Any]) -> int:
    """How many numbers the tensors of a checkpoint hold."""
    return sum(t.numel() for t in checkpoint["state_dict"].values() if isinstance(t, Tensor))


def require_peft_module(path: Path) -> tuple[dict[str, Any], int]:
    """Refuses a checkpoint that was not made with `PeftModule`, before that is built from it.

    Args:
        path: the checkpoint.

    Returns:
        The options with which the module was made, and how many numbers the checkpoint's tensors hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or the checkpoint belongs to another LightningModule.
    """
    checkpoint = read_checkpoint(path)
    record_of(checkpoint)
    options: Any = checkpoint.get("hyper_parameters", {})
    if not isinstance(options, dict) or not {"method", "task"} <= options.keys():
        raise ValueError(
            f"{path} was made with PeftCallback on a LightningModule of your own, not with PeftModule; load it by "
            "lightning_peft.load_from_checkpoint(YourModule, path)"
        )
    return options, _numbers(checkpoint)
