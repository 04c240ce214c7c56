"""The one way in which a LightningModule gets its adapter, used by `PeftCallback` and `PeftModule` alike."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.nn import ModuleList

from lightning_peft.callbacks.averages import renew_averages
from lightning_peft.callbacks.optimizer_names import note_resumed, number_by_module
from lightning_peft.callbacks.randomness import random_state, resume_random_state
from lightning_peft.callbacks.sharding import share_buffers
from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.in_place import keep_float32
from lightning_peft.core.method import Method
from lightning_peft.core.options import misfits
from lightning_peft.core.partial_state import PartialState
from lightning_peft.core.problems import an, nearest
from lightning_peft.formats.allocation import bounded
from lightning_peft.formats.base_identity import base_description, check_description, refuse_another_base
from lightning_peft.formats.reading import FORMAT, naming, refuse_later
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.handle import Adapter, adapt
from lightning_peft.methods.config import method_from_config, method_to_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Module

KEY = "lightning_peft"
"""Where a Lightning checkpoint says which adapters it holds."""

_RECORD: dict[str, Any] = {
    "format": int,
    "model": str,
    "methods": dict[str, dict[str, Any]],
    "base": dict[str, Any],
    "tensors": list[str],
    "optimizers": list[list[list[str]] | None] | None,
    "prepared": dict[str, bool],
    "training": dict[str, dict[str, Any] | None],
    "random_state": dict[str, Any] | None,
}


def adapt_lightning_module(module: LightningModule, method: Method, path: str = "", name: str = "default") -> Adapter:
    """Adapts a LightningModule, or one submodule of it, once; and makes its checkpoints hold what trains.

    Args:
        module: the module, with everything that is to be adapted built.
        method: what to do.
        path: the submodule to adapt; ``""`` takes the whole module as the base.
        name: the adapter's name.

    Returns:
        The handle; the one that exists if the module was adapted before by the same method.

    Raises:
        ValueError: if the submodule does not exist, if another method or submodule was adapted before, if the strategy
            would lose what trains, or if a callback averages what the base must keep.
    """
    root = _submodule(module, path)
    _refuse_strategy(module)
    adapter = existing_adapter(module, method, path, name)
    precision = module._trainer.precision_plugin if module._trainer is not None else None
    with default_dtype(torch.float32):
        if precision is not None and adapter is None:
            # What a plugin replaces or casts, it must have replaced before: a layer that it exchanges after the
            # injection would lose its adapter (BitsandbytesPrecision), a cast weight its float32 copy.
            # transformers refuses to cast a quantized model, though only what is not quantized would be
            precision.convert_module(ModuleList([root]) if isinstance(precision, HalfPrecision) else root)
            if isinstance(precision, BitsandbytesPrecision) and module._trainer is not None:
                # it quantizes on the device: before that a method would read weights which are about to be rounded
                root.to(module._trainer.strategy.root_device)
        with bounded(root, method):
            adapter = adapter or adapt(root, method, name)
        if isinstance(precision, HalfPrecision):
            keep_float32(module, outside=root)
        if module._trainer is not None and isinstance(module._trainer.strategy, ModelParallelStrategy):
            # it looks for every parameter in a whole checkpoint, and asks no hook; what is missing is found afterwards
            module.strict_loading = False
    share_buffers(module, root)
    hooks = module._state_dict_hooks.values()
    if not any(isinstance(hook, PartialState) and hook.path == path for hook in hooks):
        PartialState(module, path)
    renew_averages(module)
    return adapter


def _refuse_strategy(module: LightningModule) -> None:
    strategy = module._trainer.strategy if module._trainer is not None else None
    instead = "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), which is FSDP2"
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"FSDPStrategy (FSDP1) gathers checkpoints in a way that takes none without the frozen base; take {instead}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"DeepSpeedStrategy writes checkpoints of its own, which leave the adapter's record aside; take {instead}"
        )


def existing_adapter(module: LightningModule, method: Method, path: str, name: str) -> Adapter | None:
    """The adapter that a LightningModule has, if it is the one that is asked for.

    Args:
        module: the module; it need not be built yet.
        method: what is asked for.
        path: the submodule that it is for.
        name: the adapter's name.

    Returns:
        The handle, or None if nothing is adapted.

    Raises:
        ValueError: if another method or submodule was adapted before.
    """
    adapted = [n for n, m in module.named_modules() if adapters_of(m) is not None]
    if not adapted:
        return None
    if path not in adapted:
        raise ValueError(
            f"the module is already adapted at {adapted[0] or 'its root'!r}, but got model={path or None!r}"
        )
    adapter = Adapter(module.get_submodule(path), name)
    differences = _differences({name: method_to_config(adapter.method)}, {name: method_to_config(method)})
    if differences:
        raise ValueError(
            f"the module is already adapted by another method: {'; '.join(differences)}; "
            "remove() the first adapter, or start from a fresh module"
        )
    return adapter


def record_in(checkpoint: dict[str, Any], module: LightningModule, path: str) -> None:
    """Writes into a checkpoint which adapters it holds: method, base, tensors, and where the dice are, in plain values.

    The numbers in its optimizer states become the module's, and their names stand beside them.

    Args:
        checkpoint: the checkpoint that is being made.
        module: the module that is saved.
        path: the adapted submodule.
    """
    root = module.get_submodule(path)
    adapters = adapters_of(root)
    assert adapters is not None
    methods = {n: method_to_config(Adapter(root, n).method) for n in adapters}
    checkpoint[KEY] = {
        "format": FORMAT,
        "model": path,
        "methods": methods,
        "base": base_description(root, adapters),
        "tensors": sorted(checkpoint["state_dict"]),
        "optimizers": number_by_module(checkpoint, module),
        "prepared": {n: tree.record.prepared for n, tree in adapters.trees.items()},
        "training": {n: tree.record.training and tree.record.training.to_dict() for n, tree in adapters.trees.items()},
        "random_state": random_state(),
    }


def check_record(checkpoint: dict[str, Any], module: LightningModule, path: str, *, check_base: bool = True) -> None:
    """Compares a checkpoint with the module that is to take it, and takes over what the record says.

    Args:
        checkpoint: the checkpoint.
        module: the module.
        path: the adapted submodule.
        check_base: whether another base is refused.

    Raises:
        ValueError: if the checkpoint holds no adapter, belongs to another base or another method, or lacks
            tensors that it lists or that the module needs, or has numbers that they cannot be.
    """
    record = record_of(checkpoint)
    root = module.get_submodule(path)
    adapters = adapters_of(root)
    assert adapters is not None
    methods = {n: method_to_config(Adapter(root, n).method) for n in adapters}
    with naming("the checkpoint's record of its adapters"):
        # an option that the version which wrote it did not know has its default
        saved = {n: method_to_config(method_from_config(m)) for n, m in record["methods"].items()}
    if methods != saved:
        raise ValueError("the checkpoint was trained by another method: " + "; ".join(_differences(saved, methods)))
    if check_base:
        refuse_another_base(root, record["base"], "the checkpoint was made")
    _refuse_lost(record["tensors"], checkpoint, module)
    _refuse_odd_numbers(checkpoint.get("state_dict") or {}, module, f"{path}.adapters." if path else "adapters.")
    note_resumed(checkpoint, record["optimizers"], module)
    for name, tree in adapters.trees.items():
        tree.record.prepared = record["prepared"][name]
        training = record["training"][name]
        tree.record.training = training and TrainingRecord.from_dict(training)
    resume_random_state(module, record["random_state"])


def _refuse_lost(listed: list[str], checkpoint: dict[str, Any], module: LightningModule) -> None:
    state = checkpoint.get("state_dict")
    if state is None:  # a strategy that shards has loaded it, and did not ask for all
        lost = sorted(module.state_dict().keys() - set(listed))
        if lost:
            raise ValueError(f"the checkpoint lacks {len(lost)} tensors of this module, such as {lost[0]}")
        return
    lost = sorted(set(listed) - set(state))
    if lost:
        raise ValueError(f"the checkpoint lacks {len(lost)} of the tensors that it lists, such as {lost[0]}")


def _refuse_odd_numbers(state: dict[str, Any], module: LightningModule, adapters: str) -> None:
    """Refuses what a copy would turn into other numbers in silence, and values that an adapter's folder has not either.

    A base's buffers may be infinite, such as masks.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        mine = own.get(name)
        if mine is None or not isinstance(tensor, Tensor):
            continue
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, mine)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the checkpoint's {name} is of {tensor.dtype}, but must be of {mine.dtype}")
        if name.startswith(adapters) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the checkpoint's {name} holds values that are not finite; take an earlier checkpoint")


def _differences(saved: dict[str, dict[str, Any]], mine: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between methods by adapter name, a phrase each."""
    if set(saved) != set(mine):
        return [f"it has the adapters {sorted(saved)}, the module {sorted(mine)}"]
    return [
        f"{option.replace('_target_', 'method')} was {saved[name].get(option)!r} and is {mine[name].get(option)!r} here"
        for name in saved
        for option in dict.fromkeys([*saved[name], *mine[name]])
        if saved[name].get(option) != mine[name].get(option)
    ]


def record_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of its adapters.

    Args:
        checkpoint: the checkpoint.

    Raises:
        ValueError: if it has none, or one of a later version, or something is missing in it or of another type.
    """
    record: Any = checkpoint.get(KEY)
    if record is None:
        raise ValueError(
            "the checkpoint says nothing of an adapter: it was made without PeftCallback or PeftModule; load it "
            "with your module's own load_from_checkpoint"
        )
    with naming("the checkpoint's record of its adapters"):
        if not isinstance(record, dict):
            raise ValueError(f"it must be a dictionary, but is {an(type(record).__name__)}")
        refuse_later("it", record)
        wrong = misfits(record, _RECORD)
        if not wrong:
            wrong = [k for k in ("prepared", "training") if record[k].keys() != record["methods"].keys()]
        if wrong:
            raise ValueError(f"it has no {', '.join(wrong)}, or something else there; save the checkpoint again")
        check_description(record["base"])
    return record


def _submodule(module: LightningModule, path: str) -> Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        known = [n for n, _ in module.named_modules() if n]
        raise ValueError(f"{type(module).__name__} has no submodule {path!r}{nearest(path, known)}") from error


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Undoes the default dtype in which a true 16-bit plugin lets ``configure_model`` build."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
