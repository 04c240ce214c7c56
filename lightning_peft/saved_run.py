"""The checkpoints and the exported adapter of a run, and how they stand to the base on this machine."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.analysis.learning_faults import Movement
from lightning_peft.analysis.run_files import tried
from lightning_peft.callbacks.adaptation import record_of
from lightning_peft.callbacks.interrupt import NAME
from lightning_peft.core.fingerprint import OF_NOTHING
from lightning_peft.core.method import DataDriven
from lightning_peft.formats.base_identity import refuse_another_base
from lightning_peft.formats.folder import OF_A_RUN as ADAPTER
from lightning_peft.formats.folder import SavedAdapter, read_folder
from lightning_peft.formats.reading import read_checkpoint
from lightning_peft.formats.tensor_file import read_tensors
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.handle import adapt
from lightning_peft.methods.config import method_from_config
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel

BEST, LAST, INTERRUPTED = "checkpoints/best.ckpt", "checkpoints/last.ckpt", f"checkpoints/{NAME}"

_MOVES_BY = 5
"""Steps after which each trained tensor has moved: warm-up makes none in the first, and of a product that starts at
zero the second factor waits for the first."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_inf", "momentum_buffer", "sum")  # by torch's names
_SAID_OF_BASE = ("name_or_path", "revision", "tokenizer", "config", "quantization")


@dataclass(frozen=True)
class Base:
    """The base on this machine, beside what a checkpoint says of its own.

    Attributes:
        why: what was compared, or why nothing was.
        mismatch: in which way it is another one; None where it is not, or was not compared.
        compared: whether it was.
        starts: what trained tensors started as, by their name in a checkpoint, where that is no draw of numbers.
    """

    why: str
    mismatch: str | None = None
    compared: bool = False
    starts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SavedRun:
    """What a run has saved.

    Attributes:
        last: its newest checkpoint; empty where none can be read.
        record: what that says of its adapters; empty where it says nothing.
        best: its best checkpoint.
        adapter: its exported adapter's folder; None where there is none.
        tensors: that adapter's tensors.
        lacking: a sentence for each of them that is missing.
        damaged: a sentence for each of them that is there and cannot be read.
    """

    last: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    adapter: SavedAdapter | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> SavedRun:
        """Reads them; tensors of checkpoints are read from the disk when they are used.

        Args:
            folder: the run's.
        """
        saved = cls()
        saved.last = saved._tried(folder / LAST, LAST, read_checkpoint) or {}
        saved.best = saved._tried(folder / BEST, BEST, read_checkpoint) or {}
        if (folder / INTERRUPTED).exists():
            stopped = saved._tried(folder / INTERRUPTED, INTERRUPTED, read_checkpoint) or {}
            saved.last = max(saved.last, stopped, key=lambda found: found.get("global_step", -1))
        saved.last = saved.last or saved.best
        saved.adapter = saved._tried(folder / ADAPTER, ADAPTER, read_folder)
        if saved.adapter is not None:
            saved.tensors = saved._tried(folder / ADAPTER, ADAPTER, read_tensors) or {}
        if saved.last:
            try:
                saved.record = record_of(saved.last)
            except ValueError as error:
                saved.damaged.append(str(error))
        return saved

    def _tried(self, path: Path, name: str, read: Any) -> Any:
        return tried(path, name, read, self.damaged if path.exists() else self.lacking)

    @property
    def method(self) -> dict[str, Any] | None:
        """The plain values of the method that was trained."""
        methods: dict[str, dict[str, Any]] = self.record.get("methods", {})
        return next(iter(methods.values()), None)

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The optimizer's plain values."""
        found = self.last.get("hyper_parameters", {}).get("optimizer")
        return found if isinstance(found, dict) else None

    @cached_property
    def training(self) -> TrainingRecord | None:
        """How it was trained, up to the newest checkpoint."""
        said = next(iter(self.record.get("training", {}).values()), None)
        try:
            if said:
                return TrainingRecord.from_dict(said)
        except ValueError as error:
            self.lacking.append(f"what the checkpoint says of its training cannot be read: {error}")
        return self.adapter.training if self.adapter is not None else None

    @property
    def losses(self) -> list[tuple[float, float]]:
        """Step and training loss."""
        return [(p[0], p[1]) for p in self.training.losses] if self.training is not None else []

    def evaluated(self, name: str) -> list[tuple[float, float]]:
        """Step and value of a metric.

        Args:
            name: such as ``"val/loss"``.
        """
        return [(p[0], p[1]) for p in self.training.metrics.get(name, [])] if self.training is not None else []

    @property
    def reached(self) -> dict[str, float]:
        """The last value of each metric."""
        return self.training.reached if self.training is not None else {}

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint."""
        step = self.last.get("global_step")
        return step if isinstance(step, int) else None

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint."""
        step = self.best.get("global_step")
        return step if isinstance(step, int) else None

    @property
    def epoch_steps(self) -> int | None:
        """How many steps make an epoch."""
        return self.training.epoch_steps if self.training is not None else None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the base, by the file that tells it."""
        found = {"checkpoint": self.record.get("base", {}).get("fingerprint")}
        if self.adapter is not None and self.adapter.base is not None:
            found[ADAPTER] = self.adapter.base["fingerprint"]
        return {file: None if told == OF_NOTHING else told for file, told in found.items()}

    @property
    def trained(self) -> list[str]:
        """Names of the tensors that the optimizers hold."""
        optimizers = self.record.get("optimizers") or ()
        return [name for groups in optimizers for group in groups or () for name in group]

    @cached_property
    def not_finite(self) -> list[str]:
        """Names of the adapter's tensors with NaN or infinite values, in the checkpoint or the exported adapter."""
        state = self.last.get("state_dict", {})
        own = {n: t for n, t in state.items() if n in set(self.trained)} | self.tensors
        return [n for n, t in own.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]

    def without_gradient(self, base: Base, *, adam: bool) -> tuple[list[str], list[str]]:
        """Trained tensors that got no gradient.

        Args:
            base: the base on this machine, with what they started as.
            adam: whether the optimizer keeps moments from the first gradient on.

        Returns:
            Those without moments; and, where an optimizer keeps none, those that are exactly as they started.
        """
        names, without, still = self.record.get("optimizers") or [], list[str](), list[str]()
        if (self.step or 0) < _MOVES_BY:
            return without, still
        for state, groups in zip(self.last.get("optimizer_states", ()), names, strict=False):
            if groups is None or not isinstance(state, dict):
                continue
            flat = [name for group in groups for name in group]
            numbers = [n for group in state["param_groups"] for n in group["params"]]
            held = {name: state["state"].get(n) or {} for name, n in zip(flat, numbers, strict=False)}
            if adam or any(held.values()):
                without += [name for name, moments in held.items() if _are_nothing(moments)]
            else:
                still += [name for name in flat if self._stands_still(name, base)]
        return without, still

    def _stands_still(self, name: str, base: Base) -> bool:
        tensor: Tensor | None = self.last["state_dict"].get(name)
        start = base.starts.get(name)
        if tensor is None:
            return False
        return torch.equal(tensor, start) if start is not None else not bool(tensor.any())

    def movement(self, base: Base) -> Movement | None:
        """How far trained tensors are from their starts.

        Args:
            base: the base on this machine, with the starts.

        Returns:
            The movement; None where no start is known.
        """
        state, known = self.last.get("state_dict", {}), [n for n in self.trained if n in base.starts]
        known = [n for n in known if n in state and state[n].shape == base.starts[n].shape]
        count = sum(state[n].numel() for n in known)
        if not count or self.step is None:
            return None
        squares = sum(float((state[n].double() - base.starts[n].double()).square().sum()) for n in known)
        return Movement((squares / count) ** 0.5, count, self.step)

    def base(self, named: Any) -> Base:
        """Compares the base on this machine with the one that the checkpoint was made on.

        Args:
            named: what ``config.yaml`` says of the model; what is no mapping leaves the checkpoint's word.
        """
        parameters = self.last.get("hyper_parameters", {})
        said = named if isinstance(named, dict) else parameters.get("model")
        if not self.record or not isinstance(said, dict) or "task" not in parameters:
            return Base("no checkpoint says which base to compare")
        if self.record["base"]["codes"]:
            return Base("the adapter fits one quantized base alone, which is not made here to be compared")
        try:
            return self._compared(said, parameters["task"])
        except (OSError, ValueError, TypeError, ImportError) as error:
            return Base(f"the base was not compared: {str(error).splitlines()[0]}")

    def _compared(self, said: dict[str, Any], task: Any) -> Base:
        spec = BaseModel.said_by("config.yaml", {k: said[k] for k in _SAID_OF_BASE if k in said})
        # as it was before it was quantized, which the fingerprint knows; and what is here, without the network
        here = replace(spec, quantization=None, name_or_path=spec.folder())
        with torch.random.fork_rng(devices=[]):
            model = here.load(task_from_config(task))
            method = method_from_config(self.method or {})
            adapter = adapt(model, method)
        with warnings.catch_warnings(record=True) as unread:
            warnings.simplefilter("always")
            try:
                refuse_another_base(model, self.record["base"], "the checkpoint was made")
            except ValueError as error:
                mismatch, _, _ = str(error).partition("; check_base=False")
                return Base("", mismatch, compared=True)
        if unread:
            return Base(f"the base was not compared: {unread[0].message}")
        drawn = isinstance(method, DataDriven) and method.needs_data
        new = set(adapter.tree.record.new)
        in_place = {n for n in adapter.tree.record.in_place if n not in new}
        prefix = f"{self.record['model']}." if self.record["model"] else ""
        starts = {
            f"{prefix}{name}": tensor.detach()
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name in in_place or (not drawn and _is_constant(tensor))
        }
        why = f"the base in {spec.name_or_path} on this machine is the same"
        if self.record["base"]["fingerprint"] == OF_NOTHING:
            why = "all weights train, so none is left by which to tell another base"
        return Base(why, compared=True, starts=starts)


def _are_nothing(moments: Any) -> bool:
    """Whether a parameter has no moments, or all are zero; those of a layout of its own count as something."""
    if not isinstance(moments, dict) or not moments:
        return True
    known = [moments[name] for name in _MOMENTS if isinstance(moments.get(name), Tensor)]
    return bool(known) and not any(bool(t.any()) for t in known)


def _is_constant(tensor: Tensor) -> bool:
    """Whether a start is a number that a method chose; one number alone may have been drawn, unless it is 0 or 1."""
    if not tensor.numel():
        return False
    first = tensor.flatten()[0]
    return bool((tensor == first).all()) and (tensor.numel() > 1 or first.item() in (0.0, 1.0))
