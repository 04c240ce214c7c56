"""What a method does around the steps of a Trainer: looking at data before the first, acting before and after each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_peft.callbacks.randomness import random_state, restore_random_state
from lightning_peft.core.mode import evaluating
from lightning_peft.core.sharded import sharded_modules
from lightning_peft.handle import Adapter

_TOTAL = "_peft_total_steps"


def prepare(trainer: Trainer, module: LightningModule, adapter: Adapter) -> None:
    """Shows the adapter training data if it asks for some, before the first step; a resumed run has seen it.

    The batches are those of the training loader, which begins anew afterwards; random generators are left as they
    were, so that the run draws what it would have drawn. Over several ranks the first one's tensors are taken.

    Args:
        trainer: the trainer, its loaders set up.
        module: the module whose ``training_step`` gives the loss.
        adapter: the adapter.

    Raises:
        ValueError: if the module optimizes by hand, so that its ``training_step`` would step, or if the model is
            sharded, so that no process has its weights.
    """
    if not adapter.needs_data:
        return
    if sharded_modules(adapter.model):
        raise ValueError(
            f"{type(adapter.method).__name__} is to look at data and at whole weights before it trains, but the model "
            "is sharded; save a checkpoint after a first step under another strategy, and resume it with this one"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"{adapter.method!r} looks at data before it trains, but the module optimizes by hand; call "
            "adapter.prepare(losses) in on_train_start"
        )
    state = random_state()
    try:
        with evaluating(module):
            adapter.prepare(_losses(trainer, module))
    finally:
        restore_random_state(state)
    if trainer.world_size > 1:
        adapter.tree.load_state_dict(trainer.strategy.broadcast(adapter.tree.state_dict()))


def _losses(trainer: Trainer, module: LightningModule) -> Iterator[Callable[[], Tensor]]:
    # several loaders give one batch together; the loop's own iterators are left alone
    loop = cast(Any, trainer.fit_loop)._combined_loader
    for batch, number, _ in CombinedLoader(loop.iterables, loop._mode):
        here = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        yield functools.partial(_loss, trainer, module, here, number)


def _loss(trainer: Trainer, module: LightningModule, batch: Any, number: int) -> Tensor:
    # these are no steps of the training: what training_step logs is not said of it
    silent = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
    module.__dict__.update(silent)
    try:
        with trainer.precision_plugin.train_step_context():
            # Lightning hands the number on only to a step that takes one
            numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            output: Any = module.training_step(*((batch, number) if numbered else (batch,)))
    finally:
        for name in silent:
            del module.__dict__[name]
    return cast(Tensor, output["loss"] if isinstance(output, dict) else output)


def check_schedule(trainer: Trainer, adapter: Adapter) -> None:
    """Refuses a training that a scheduled method does not fit, before its first step.

    Args:
        trainer: the trainer, its loaders set up.
        adapter: the adapter.

    Raises:
        ValueError: if the schedule does not fit, or goes by the training's length and that has no end.
    """
    if adapter.scheduled is not None:
        adapter.scheduled.check_schedule(_total(trainer, adapter))


def before_step(trainer: Trainer, adapter: Adapter) -> None:
    """Lets a scheduled method see the gradients of the step to come.

    Args:
        trainer: the trainer.
        adapter: the adapter.
    """
    if adapter.scheduled is not None and not _left_out(trainer, adapter):
        adapter.before_step(trainer.global_step + 1, _total(trainer, adapter))


def after_step(trainer: Trainer, adapter: Adapter, step: int) -> None:
    """Lets a scheduled method act on the parameters after a step.

    Args:
        trainer: the trainer.
        adapter: the adapter.
        step: the number of the step that was made, from 1.
    """
    if adapter.scheduled is not None and not _left_out(trainer, adapter):
        adapter.after_step(step, _total(trainer, adapter))


@contextmanager
def going_by(module: LightningModule, total: float) -> Iterator[None]:
    """Steps that are tried before a training, and follow its schedule as its first ones will.

    Args:
        module: the module.
        total: how many steps the training has.
    """
    module.__dict__[_TOTAL] = total
    try:
        yield
    finally:
        del module.__dict__[_TOTAL]


def _left_out(trainer: Trainer, adapter: Adapter) -> bool:
    """Whether a step has no gradients at all, as one that `NonFiniteLoss` takes them from; by hand they may be gone."""
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and all(p.grad is None for p in adapter.parameters())


def _total(trainer: Trainer, adapter: Adapter) -> int:
    assert adapter.scheduled is not None
    known = trainer.lightning_module.__dict__.get(_TOTAL) or trainer.estimated_stepping_batches
    total = adapter.scheduled.total_step or known
    if total == float("inf"):
        raise ValueError(
            f"{type(adapter.method).__name__} follows a schedule over the whole training, but this one has no end; "
            "set max_epochs or max_steps"
        )
    return int(total)
