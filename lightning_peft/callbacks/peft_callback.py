"""PeftCallback: one line in the Trainer adapts any LightningModule."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.nn import Module
from typing_extensions import override

from lightning_peft.analysis.plan import plan_within
from lightning_peft.analysis.report import print_plan
from lightning_peft.callbacks.adaptation import (
    adapt_lightning_module,
    check_record,
    existing_adapter,
    record_in,
)
from lightning_peft.callbacks.advice import Advice
from lightning_peft.callbacks.checkpoint_files import keep_files_whole, refuse_unwritable_folders
from lightning_peft.callbacks.learning import check_optimizers, refuse_unsaved, warn_of_missing_gradients
from lightning_peft.callbacks.optimizer_names import match_resumed
from lightning_peft.callbacks.rebuilding import adapted_parts, carry_over, refuse_rebuilt_parts
from lightning_peft.callbacks.record_training import RecordTraining
from lightning_peft.callbacks.steps import after_step, before_step, check_schedule, prepare
from lightning_peft.callbacks.within_epoch import keep_gradients, note_unfinished, resume_within_epoch
from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.method import Method, require_method
from lightning_peft.handle import Adapter

_PENDING = "_peft_pending"


@dataclass
class Pending:
    """What is to be done to a LightningModule as soon as its modules are built.

    Attributes:
        method: the method.
        path: the submodule to adapt.
        name: the adapter's name.
        check_base: whether a checkpoint of another base is refused.
        replaced: what was arranged before, until this is carried out.
        done: whether it was carried out.
        parts: the modules that it was carried out on, by their names below the submodule.
    """

    method: Method
    path: str
    name: str
    check_base: bool = True
    replaced: Pending | None = None
    done: bool = False
    parts: dict[str, Module] = field(default_factory=dict)

    def is_over(self, module: LightningModule) -> bool:
        """Whether it was carried out and the adapters have been removed since, or merged for good."""
        if not self.done:
            return False
        root = module.get_submodule(self.path)
        removed = not self._was_rebuilt(root) or not adapted_parts(self.parts[""], self.name)
        return removed and adapters_of(root) is None

    def _was_rebuilt(self, root: Module) -> bool:
        return bool(self.parts) and self.parts[""] is not root

    def note_parts(self, module: LightningModule) -> None:
        """Remembers what is adapted now."""
        root = dict(module.named_modules()).get(self.path)
        self.parts = {} if root is None else adapted_parts(root, self.name)

    def carry_out(self, module: LightningModule) -> None:
        """Adapts the module, or finds that it is; a submodule built anew gets what the one before had become."""
        adapter = adapt_lightning_module(module, self.method, self.path, self.name)
        if not self._was_rebuilt(adapter.model):
            refuse_rebuilt_parts(adapter.model, self.parts)
        elif adapted_parts(self.parts[""], self.name):
            carry_over(self.parts[""], adapter.model, self.name)
        self.note_parts(module)
        self.replaced, self.done = None, True


class PeftCallback(RecordTraining):
    """Adapts the LightningModule: freezes it, injects a method, and keeps checkpoints to what trains.

    The same model is seen by fit, validate, test and predict; a checkpoint resumes with ``ckpt_path`` and is
    loaded by `load_from_checkpoint`.

    Args:
        method: the method, such as ``LoRA(r=8)``.
        model: the name of the submodule to adapt and freeze; what lies outside stays as it is. None takes the
            whole LightningModule as the base.
        name: the adapter's name.
        print_plan: print what trains where, once.
        check_base: refuse checkpoints that were made on another base.

    Raises:
        TypeError: if ``method`` is no method.

    Example:
        >>> from lightning_peft import LoRA, PeftCallback
        >>> PeftCallback(LoRA(r=4), model="backbone").method.r
        4
    """

    def __init__(
        self,
        method: Method,
        model: str | None = None,
        name: str = "default",
        *,
        print_plan: bool = True,
        check_base: bool = True,
    ) -> None:
        super().__init__()
        require_method(method)
        if model is not None and not isinstance(model, str):
            raise TypeError(f"model must be the name of a submodule, such as 'backbone', but got {model!r}")
        self.method = method
        self.model = model or ""
        self.name = name
        self.print_plan = print_plan
        self.check_base = check_base
        self._checked = False
        self._saved: set[int] = set()
        self._printed = False
        self._steps = 0
        self._advice = Advice()

    @override
    def __repr__(self) -> str:
        where = f", model={self.model!r}" if self.model else ""
        return f"PeftCallback({self.method!r}{where})"

    @property
    @override
    def state_key(self) -> str:
        return f"PeftCallback[{self.name}]"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arranges that the module is adapted right after its ``setup`` and ``configure_model``.

        Raises:
            ValueError: if the Trainer has another PeftCallback, or the module is adapted otherwise.
        """
        others = [c for c in trainer.callbacks if isinstance(c, PeftCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise ValueError(
                f"a Trainer takes one PeftCallback, but got {self!r} and {others[0]!r}; put other adapters into the "
                "module with adapt() before the training"
            )
        keep_files_whole(trainer)
        await_modules(pl_module, Pending(self.method, self.model, self.name, self.check_base))

    def adapter(self, pl_module: LightningModule) -> Adapter:
        """The handle on the adapter, once the module is adapted.

        Args:
            pl_module: the module.
        """
        return Adapter(pl_module.get_submodule(self.model), self.name)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checked = False
        match_resumed(pl_module)
        refuse_unwritable_folders(trainer)
        if self.print_plan and not self._printed:
            self._printed = True
            rank_zero_only(print_plan)(plan_within(pl_module, self.model, self.name))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once a fit, names the trainable parameters that got no gradient."""
        if self._checked:
            return
        self._checked = True
        warn_of_missing_gradients(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees that the optimizers hold what trains, and checkpoints what the optimizers hold."""
        super().on_train_start(trainer, pl_module)
        self._steps = trainer.global_step
        check_optimizers(trainer.optimizers, pl_module, self.adapter(pl_module))
        self._saved = set()
        for optimizer in trainer.optimizers:
            refuse_unsaved(optimizer, pl_module, self._saved)
        check_schedule(trainer, self.adapter(pl_module))
        resume_within_epoch(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._advice.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        refuse_unsaved(optimizer, pl_module, self._saved)
        before_step(trainer, self.adapter(pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lets a scheduled method act, where the batch ended a step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._advice.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            after_step(trainer, self.adapter(pl_module), trainer.global_step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._advice.on_exception(trainer, pl_module, exception)


def await_modules(module: LightningModule, pending: Pending) -> None:
    """Patches a LightningModule to adapt itself at the end of ``configure_model``, and to say so in checkpoints.

    Args:
        module: the module.
        pending: what to do.

    Raises:
        ValueError: if something else is already arranged or carried out.
    """
    before = module.__dict__.get(_PENDING)
    if before is not None and before.is_over(module):
        before = None
    if before is not None and (before.path, before.name) != (pending.path, pending.name):
        raise ValueError(
            f"the module is already to be adapted at {before.path or 'its root'!r} as {before.name!r}, but got "
            f"{pending.path or 'its root'!r} as {pending.name!r}; use one PeftCallback"
        )
    existing_adapter(module, pending.method, pending.path, pending.name)
    pending.replaced = before
    pending.note_parts(module)
    module.__dict__[_PENDING] = pending
    # Lightning looks into a partial and sees the hook as overridden; through functools.wraps it would see the original.
    # A bound method would be pickled as the attribute of that name, which is the class's while a module is rebuilt.
    for hook in _hooks():
        module.__dict__[hook.__name__] = partial(hook, module)


def _hooks() -> tuple[FunctionType, ...]:
    hooks = (configure_model, on_train_start, on_save_checkpoint, on_load_checkpoint)
    return cast(tuple[FunctionType, ...], hooks)


def _call_off(module: LightningModule, pending: Pending) -> None:
    """Takes back what `await_modules` arranged, so that a refused method leaves the module as it was."""
    if pending.replaced is not None:
        module.__dict__[_PENDING] = pending.replaced
        return
    del module.__dict__[_PENDING]
    for hook in _hooks():
        module.__dict__.pop(hook.__name__, None)


def configure_model(self: LightningModule) -> None:
    """Builds the module as its class does, then adapts it."""
    type(self).configure_model(self)
    pending: Pending = self.__dict__[_PENDING]
    if pending.is_over(self):
        return
    try:
        pending.carry_out(self)
    except Exception:
        _call_off(self, pending)
        raise


def on_train_start(self: LightningModule) -> None:
    """Shows a data-driven method its data; the learning-rate finder, which runs without callbacks, comes here too."""
    type(self).on_train_start(self)
    pending: Pending = self.__dict__[_PENDING]
    adapters = adapters_of(self.get_submodule(pending.path))
    if adapters is not None and pending.name in adapters:
        prepare(self.trainer, self, Adapter(self.get_submodule(pending.path), pending.name))


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds to the checkpoint which adapters it holds, for which base."""
    type(self).on_save_checkpoint(self, checkpoint)
    path = self.__dict__[_PENDING].path
    if adapters_of(self.get_submodule(path)) is not None:
        record_in(checkpoint, self, path)
        note_unfinished(self, checkpoint)


def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint of another base or method before its weights are loaded."""
    type(self).on_load_checkpoint(self, checkpoint)
    pending: Pending = self.__dict__[_PENDING]
    if adapters_of(self.get_submodule(pending.path)) is not None:
        check_record(checkpoint, self, pending.path, check_base=pending.check_base)
        keep_gradients(self, checkpoint)
