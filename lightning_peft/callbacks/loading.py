"""Rebuilding a user's LightningModule, adapters included, from a checkpoint that holds what trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_peft.callbacks.adaptation import record_of
from lightning_peft.callbacks.peft_callback import Pending, await_modules
from lightning_peft.core.generated import original_class
from lightning_peft.formats.allocation import made_for
from lightning_peft.formats.reading import naming, read_checkpoint
from lightning_peft.formats.vouched import stored_numbers
from lightning_peft.methods.config import method_from_config

T = TypeVar("T", bound=LightningModule)

BUILT_PLAINLY: dict[str, Any] = {"_instantiator": None}
"""To be given to Lightning's loading, so that no parser builds what the options of a checkpoint name."""

_FORMER = ("hparams", "module_arguments", "hparams_type")  # whence Lightning would take options and their class besides


def load_from_checkpoint(
    cls: type[T], path: str | Path, map_location: Any = "cpu", *, check_base: bool = True, **kwargs: Any
) -> T:
    """Builds the module, adapts it as the checkpoint says, and loads what was trained.

    The base comes from the module itself, as for a fresh run: its weights are not in the checkpoint. The module is
    built as a Trainer builds it: ``__init__``, ``setup("predict")``, ``configure_model``. A ``setup`` that wants more
    than there is here, such as a Trainer or data, may fail where all that was saved finds its place nevertheless.
    Saved hyperparameters are passed as the plain values that they are: what LightningCLI built from a ``class_path``
    is to be given again.

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
        ValueError: if the file is damaged or of a later version, holds no adapter, belongs to another base, or names
            classes to build.
        RuntimeError: if its tensors are not those that the module expects.
    """
    cls = original_class(cls)
    checkpoint = read_checkpoint(Path(path))
    with naming(Path(path)):
        record = record_of(checkpoint)
    refuse_named_classes(path, checkpoint, kwargs)
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
        with made_for(stored_numbers(checkpoint["state_dict"])):
            options = {**kwargs, **BUILT_PLAINLY}
            module = maker.load_from_checkpoint(path, map_location=map_location, weights_only=True, **options)
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


def refuse_named_classes(path: str | Path, checkpoint: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that has classes imported and made, or options beside its hyperparameters.

    LightningCLI notes in the hyperparameters that its parser is to build the module; that parser imports every class
    that they name.

    Args:
        path: the checkpoint, for the error.
        checkpoint: its content.
        given: the options that stand above the checkpoint's.

    Raises:
        ValueError: if it does.
    """
    for key in _FORMER:
        if key in checkpoint:
            raise ValueError(
                f"{path} has options of the module under {key!r}, but they are read from 'hyper_parameters' alone, "
                "where every version of Lightning that this package supports writes them"
            )
    options = checkpoint.get("hyper_parameters", {})
    if "_instantiator" not in options:
        return
    for option, value in options.items():
        named = None if option in given else _class_path_in(value)
        if named is not None:
            raise ValueError(
                f"{path} names the class {named!r} for {option!r}, and no file has classes imported; make the object "
                f"and give it: load_from_checkpoint(..., {option}=...)"
            )


def _class_path_in(value: Any) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return value["class_path"]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for v in inner if (found := _class_path_in(v)) is not None), None)


def require_peft_module(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Refuses a checkpoint that was not made with `PeftModule`, before that is built from it.

    Args:
        path: the checkpoint.
        given: the options that stand above the checkpoint's.

    Returns:
        The options with which the module was made, and how many numbers the checkpoint's tensors hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, belongs to another LightningModule, or names classes to build.
    """
    checkpoint = read_checkpoint(path)
    with naming(path):
        record_of(checkpoint)
    refuse_named_classes(path, checkpoint, given)
    options: Any = checkpoint.get("hyper_parameters", {})
    if not isinstance(options, dict) or not {"method", "task"} <= options.keys():
        raise ValueError(
            f"{path} was made with PeftCallback on a LightningModule of your own, not with PeftModule; load it by "
            "lightning_peft.load_from_checkpoint(YourModule, path)"
        )
    # the name of an argument that is to get all options together
    if checkpoint.get("hparams_name") in {*options, "check_base"}:
        raise ValueError(f"{path} gives all its options to {checkpoint['hparams_name']!r}, which is one of them")
    return options, stored_numbers(checkpoint["state_dict"])
