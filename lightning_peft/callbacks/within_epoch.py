"""Checkpoints from within an epoch: what they need besides, and how a run goes on from them."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft.callbacks.adaptation import KEY
from lightning_peft.callbacks.randomness import RESUMED, restore_random_state
from lightning_peft.core.problems import an
from lightning_peft.data.streaming import StreamedBatches

_GRADIENTS = "_peft_gradients"


def note_unfinished(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds to a checkpoint what Lightning leaves out of one from the middle of an optimizer step or a validation.

    Between the batches of one step there are gradients: without them the resumed step would be made of the batches
    that are left. A validation that is due after the last batch, or is going on, is one that Lightning would leave out
    or finish with the rest of its batches.

    Args:
        module: the module that is saved.
        checkpoint: the checkpoint with its `KEY`; changed in place.
    """
    trainer = module._trainer
    if trainer is None or trainer.state.fn != "fit" or "loops" not in checkpoint:
        return
    loop = trainer.fit_loop.epoch_loop
    if loop.batch_progress.current.ready and loop._should_accumulate() and trainer.world_size == 1:
        checkpoint[KEY]["gradients"] = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if _validation_is_due(trainer):
        state = checkpoint["loops"]["fit_loop"]
        for count in (state["epoch_loop.batch_progress"]["total"], state["epoch_loop.batch_progress"]["current"]):
            count["completed"] = count["processed"]
        # by which Lightning knows one that was cut short, here before its first batch was over
        validation = state["epoch_loop.val_loop.batch_progress"]
        done = validation["total"]["completed"]
        validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["is_last_batch"] = False


def _validation_is_due(trainer: Trainer) -> bool:
    loop: Any = trainer.fit_loop.epoch_loop
    fetcher, trained = trainer.fit_loop._data_fetcher, loop.batch_progress.total
    if trainer.sanity_checking or fetcher is None or loop.val_loop.skip:
        return False
    if trainer.validating:
        judged = loop.val_loop.batch_progress
        return not (judged.is_last_batch and judged.current.completed == judged.current.ready)
    return bool(trained.completed == trained.processed - 1 and loop._should_check_val_fx(fetcher))


def keep_gradients(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """To be called when a checkpoint is loaded: remembers the gradients that `note_unfinished` put there.

    Args:
        module: the module that loads.
        checkpoint: the checkpoint.

    Raises:
        ValueError: if they are no gradients of the module's parameters.
    """
    gradients = checkpoint[KEY].get("gradients")
    shapes = {n: p.shape for n, p in module.named_parameters()}
    if gradients is not None and not isinstance(gradients, dict):
        raise ValueError(f"the checkpoint's gradients must be a dictionary, but are {an(type(gradients).__name__)}")
    for name, gradient in (gradients or {}).items():
        if not isinstance(gradient, Tensor) or gradient.shape != shapes.get(name):
            raise ValueError(f"the checkpoint's gradient of {name!r} is none of a parameter of this module")
    if gradients and module._trainer is not None and module._trainer.state.fn == "fit":
        module.__dict__[_GRADIENTS] = gradients


def resume_within_epoch(module: LightningModule) -> None:
    """To be called in ``on_train_start``: puts back what only counts within an epoch, and says what cannot be.

    Args:
        module: the module that trains.
    """
    for name, gradient in module.__dict__.pop(_GRADIENTS, {}).items():
        parameter = module.get_parameter(name)
        parameter.grad = gradient.to(parameter.device)
    state = module.__dict__.pop(RESUMED, None)
    loop: Any = module.trainer.fit_loop.epoch_loop
    batches = loop.batch_progress
    if state is None or not batches.current.ready:
        return
    due = loop.val_loop.restarted_mid_evaluation
    if not batches.is_last_batch or due:
        restore_random_state(state)  # the epoch's order was drawn before it was taken
    else:
        _leave_epoch_behind(module.trainer, state)
    if not batches.is_last_batch:
        _warn_of_loaders(module.trainer)


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def _is_restorable(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _leave_epoch_behind(trainer: Trainer, random_state: dict[str, Any]) -> None:
    """Has loaders that were saved when they had given the last batch of an epoch begin the next one."""
    loop: Any = trainer.fit_loop
    if not any(_is_restorable(loader) for loader in _loaders(trainer)):
        return
    if loop._combined_loader_states_to_load:  # Lightning does not load them where an epoch is complete
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)
    # what they give now is the end of the epoch that is over, which is nothing
    restore_random_state(random_state)
    iter(loop._data_fetcher)


def _warn_of_loaders(trainer: Trainer) -> None:
    lost = [
        type(loader).__name__
        for loader in _loaders(trainer)
        if not _is_restorable(loader) and not isinstance(getattr(loader, "dataset", None), StreamedBatches)
    ]
    # Lightning's own warning knows no loaders without a length, and not what happens
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    if lost:
        rank_zero_warn(
            f"this run goes on in the middle of an epoch, where its {lost[0]} cannot be put: the rest of the epoch is "
            "made of batches from the loader's beginning, some of which were trained on already. For the same batches "
            "as without the interruption use torchdata's StatefulDataLoader, another loader that has state_dict and "
            "load_state_dict, or checkpoints from the ends of epochs"
        )
