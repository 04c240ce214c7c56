"""What a training step takes, said before the model's weights are loaded, and a stop where it cannot fit."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_peft.analysis.device_memory import memory_for_a_step
from lightning_peft.analysis.run_files import FORECAST
from lightning_peft.analysis.sizes import size
from lightning_peft.analysis.step_memory import StepMemory
from lightning_peft.callbacks.what_fits import what_fits
from lightning_peft.core.method import Method
from lightning_peft.data.rows import RowDataModule
from lightning_peft.forecast import Step
from lightning_peft.formats.writing import write_json
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.task import Task

SCHEMA = 1
_WRITTEN = ("weights", "trained", "gradients", "optimizer", "kept", "logits", "peak")
_WIDTH = 80  # columns, also where nobody watches


@runtime_checkable
class _Countable(Protocol):
    """A LightningModule that says what it will build, as `PeftModule` does."""

    base: BaseModel | None
    task: Task
    method: Method
    optimizer: dict[str, Any]


class Forecast(Callback):
    """Counts a training step's memory as `imitated_step` does, before `PeftModule` loads its model.

    The step is one of the largest batch that the data holds, in the Trainer's precision. Where it cannot be counted,
    training goes on, and one line says why once the model is built. Training is to the bit what it is without.

    Args:
        folder: where to write ``forecast.json``; None writes nothing.
        force: train also where a step cannot fit.
        memory: bytes that a step may take; None takes what the device has: of a GPU all but `RESERVE` and what others
            use, else the machine's memory or what this process may have of it.

    Raises:
        ValueError: if ``memory`` is not above 0.
    """

    def __init__(self, folder: str | Path | None = None, *, force: bool = False, memory: float | None = None) -> None:
        if memory is not None and memory <= 0:
            raise ValueError(
                f"memory must be a number of bytes above 0, or None for what the device has, but got {memory}"
            )
        self.folder = folder
        self.force = force
        self.memory = memory
        self._reason: str | None = None
        self._packed = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says what a step takes.

        Raises:
            ValueError: if a step takes more than there is, with what would fit.
        """
        if stage == "fit":
            packing = bool(getattr(getattr(pl_module, "task", None), "packing", False))
            self._say(trainer, pl_module, packed=packing)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says why nothing was said; a run that fails for the same reason has said it itself by now.

        Raises:
            ValueError: if rows are padded, which only the built model tells, and such a step takes more than there is.
        """
        if self._packed and not getattr(pl_module, "runs_without_padding", False):
            self._say(trainer, pl_module, packed=False)
        if self._reason is not None and trainer.is_global_zero:
            said = f"no forecast of a step's memory: {self._reason}"
            print(textwrap.fill(said, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))

    def _say(self, trainer: Trainer, module: LightningModule, *, packed: bool) -> None:
        device = trainer.strategy.root_device
        limit = self._limit(trainer)
        self._reason, self._packed = None, False
        try:
            with _aside():
                step = _step_of(trainer, module, packed=packed)
                found = step.memory()
        except Exception as error:  # whatever it is, a training does not hang on it
            self._reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return
        self._packed = step.packed
        fits = limit is None or found.peak <= limit
        allowed = None if limit is None else f"{size(limit)} {self._whose(device)}"
        if trainer.is_global_zero:
            if self.folder is not None:
                write_json(Path(self.folder) / FORECAST, _written(step, found))
            if fits or self.force:
                print(_said(step, found, allowed, fits=fits))
        if limit is not None and not fits and not self.force:
            with _aside():
                ways = what_fits(step, limit, trainer.accumulate_grad_batches)
            raise ValueError(
                f"a step of {step.spoken} takes {size(found.peak)}, more than the {allowed}; {ways}; force=true trains "
                "all the same"
            )

    def _whose(self, device: torch.device) -> str:
        if self.memory is not None:
            return "that it may take"
        return f"of this {'GPU' if device.type == 'cuda' else 'machine'}"

    def _limit(self, trainer: Trainer) -> int | None:
        """Bytes for a step, the same in all processes, so that all of them go on or none."""
        device = trainer.strategy.root_device
        limit = memory_for_a_step(device) if self.memory is None else int(self.memory)
        if limit is not None and self.memory is None and device.type == "cpu":
            limit //= max(1, trainer.num_devices)  # processes that share the machine
        if limit is not None and trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy):
            limit = int(trainer.strategy.reduce(torch.tensor(limit, device=device), reduce_op="min"))
        return limit


@contextmanager
def _aside() -> Iterator[None]:
    """A block after which random numbers are drawn as if it had not been, and which says nothing that training says."""
    with warnings.catch_warnings(), isolate_rng(include_cuda=False):
        warnings.simplefilter("ignore")
        yield


def _step_of(trainer: Trainer, module: LightningModule, *, packed: bool) -> Step:
    """The step that a run makes.

    Raises:
        ValueError: if its model, its data or its strategy is one of which too little is known.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"under {type(trainer.strategy).__name__} each process holds a part of the model")
    if not isinstance(module, _Countable) or module.base is None:
        raise ValueError("the model was built before, or elsewhere than in PeftModule")
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RowDataModule):
        raise ValueError("how large a batch is, only TextDataModule and ImageDataModule tell beforehand")
    rows, tokens, is_packed = data.largest_batch(packed=packed)
    positions = module.base.positions() if tokens is not None else None
    return Step(
        module.base,
        module.task,
        module.method,
        module.optimizer,
        str(trainer.precision),
        rows,
        tokens if tokens is None or positions is None else min(tokens, positions),
        packed=is_packed,
        on_cpu=trainer.strategy.root_device.type == "cpu",
    )


def _written(step: Step, found: StepMemory) -> dict[str, Any]:
    parts = asdict(found)
    return {
        "schema": SCHEMA,
        "rows": step.rows,
        "tokens": step.tokens,
        "precision": step.precision,
        **{name: parts[name] for name in _WRITTEN},
    }


def _said(step: Step, found: StepMemory, limit: str | None, *, fits: bool) -> str:
    weights, training = found.weights + found.trained, found.gradients + found.optimizer
    rest = found.peak - weights - training
    lines = [
        f"A step of {step.spoken} takes {size(found.peak)}" + (f" of the {limit}" if limit else ""),
        f"  weights {size(weights)}, gradients and optimizer {size(training)}, the batch {size(rest)}",
    ]
    return "\n".join(lines if fits else [*lines, "  which is more than fits; force=true trains all the same"])
