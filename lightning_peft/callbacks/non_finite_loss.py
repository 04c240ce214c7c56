"""What a run does about a loss that is NaN or infinite: it stops, leaves the step out, or goes back."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.core.statistics import KeptStatistics

Action = Literal["stop", "skip", "roll_back"]

_REMEDY = (
    "A lower learning rate, trainer.gradient_clip_val=1.0, or bf16-mixed in place of 16-mixed are what usually helps; "
    "see the rows of the batch too"
)


class NonFiniteLoss(Callback):
    """Looks at the loss and the gradients of each optimizer step before it is made.

    So no parameter takes a value from such a step, and checkpoints hold the last good ones. Where several devices
    train, all of them do what one of them has to. With a gradient scaler (``16-mixed``) infinite gradients are part of
    how it finds its scale; there only the loss counts.

    Args:
        action: ``"stop"`` ends the run with an error; ``"skip"`` leaves the step out: parameters, optimizer and the
            running statistics of batch norms stay as they are; data, schedules and random generators go on, and other
            buffers that a forward changes stay changed; ``"roll_back"`` also puts what a checkpoint holds, and the
            optimizer, back to where they were at the last multiple of ``every_n_steps``, for losses that come of a
            step gone wrong before.
        patience: so many steps in a row end the run with any action, since nothing gets better.
        every_n_steps: optimizer steps between two states that one can roll back to; each is a copy on the CPU.

    Raises:
        ValueError: if an option is out of its range.

    Example:
        >>> NonFiniteLoss("skip").patience
        10
    """

    def __init__(self, action: Action = "stop", patience: int = 10, every_n_steps: int = 100) -> None:
        known = get_args(Action)
        raise_problems(
            type(self).__name__,
            [
                None if action in known else f"action={action!r} is unknown{nearest(str(action), known)}",
                f"patience must be 1 or more, but got {patience}" if patience < 1 else None,
                f"every_n_steps must be 1 or more, but got {every_n_steps}" if every_n_steps < 1 else None,
            ],
        )
        self.action = action
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.skipped = 0
        self._in_row = 0
        self._bad: Tensor | None = None
        self._statistics: KeptStatistics | None = None
        self._good: tuple[int, dict[str, Tensor], list[dict[str, Any]]] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skipped = self._in_row = 0
        self._bad = None
        self._statistics = KeptStatistics(pl_module)
        self._statistics.keep()
        self._remember(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics = None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        of_loss, self._bad = self._bad is not None and bool(self._bad), None
        bad = of_loss or not (_scales(trainer) or _finite(optimizer))
        assert self._statistics is not None  # since the training began
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            self._in_row = 0
            self._statistics.keep()
            return
        self._statistics.put_back()
        self._in_row += 1
        self.skipped += 1
        what = "loss" if of_loss else "gradient" if bad else "loss or gradient on another device"
        seen = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch}): the {what} is NaN or infinite"
        if self.action == "stop" or self._in_row >= self.patience:
            row = f", as in {self._in_row - 1} steps before it" if self._in_row > 1 else ""
            instead = "; or have such steps left out: NonFiniteLoss('skip') or NonFiniteLoss('roll_back')"
            raise RuntimeError(
                f"{seen}{row}. The step was not made, and no checkpoint holds it. {_REMEDY}"
                + (instead if self.action == "stop" else "")
            )
        if self.action == "roll_back":
            seen += f"; parameters and optimizer are put back to those of step {self._roll_back(trainer, pl_module)}"
        held = (p for group in optimizer.param_groups for p in group["params"])  # some may belong to no module
        for parameter in (*pl_module.parameters(), *held):  # an optimizer leaves alone what has no gradient
            parameter.grad = None
        rank_zero_warn(f"{seen}; the step is left out. {_REMEDY}.")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._good is not None and step > self._good[0] and step % self.every_n_steps == 0 and not self._in_row:
            self._remember(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run where a step of finite loss has spoilt the weights, before a checkpoint takes them."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for name in ("val/loss", "val_loss"):
            loss = trainer.callback_metrics.get(name)
            if loss is not None and not bool(torch.isfinite(loss)):
                raise RuntimeError(
                    f"step {trainer.global_step} (epoch {trainer.current_epoch}): {name} is {float(loss)} in the "
                    "validation, so a step before it has spoilt the weights, or its rows give no loss. No checkpoint "
                    f"is written of it, and those before stay. {_REMEDY}"
                )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to write what is broken over what is not."""
        state: dict[str, Tensor] = checkpoint["state_dict"]
        broken = [n for n, t in state.items() if torch.is_floating_point(t) and not bool(torch.isfinite(t).all())]
        if broken:
            raise RuntimeError(
                f"{len(broken)} of the tensors to be saved hold NaN or infinite values, such as {broken[0]}; the "
                f"checkpoint is not written, and those before stay. {_REMEDY}"
            )

    def _remember(self, trainer: Trainer, module: LightningModule) -> None:
        if self.action != "roll_back":
            return
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}
        moments = [_on_cpu(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
        self._good = trainer.global_step, state, moments

    def _roll_back(self, trainer: Trainer, module: LightningModule) -> int:
        assert self._good is not None  # since the training began
        step, state, moments = self._good
        module.load_state_dict(state)
        for optimizer, kept in zip(trainer.optimizers, moments, strict=True):
            # rates follow the schedule, which goes on
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(kept), "param_groups": groups})
        return step


def _scales(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _finite(optimizer: Optimizer) -> bool:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # of what is sharded each process looks at its own; a largest number over processes may lose a NaN
    grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    grads = [g for g in grads if g.numel()]
    if not grads:
        return True
    # the largest magnitude: squares of finite numbers may be beyond their dtype
    return bool(torch.isfinite(get_total_norm(grads, norm_type=float("inf"))))


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    return {key: _on_cpu(value) for key, value in state.items()} if isinstance(state, dict) else state
