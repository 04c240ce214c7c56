"""How an adapter was trained, in plain values that go where it goes: into checkpoints, its folder, its model card."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from lightning_peft.core.options import check_types, misfits, range_problems
from lightning_peft.core.problems import raise_problems

_POINTS = 400
"""Points that a curve of training losses has at most: more than a picture shows, few enough for a checkpoint."""

_DATA: dict[str, Any] = {
    "origin": str | None,
    "hub_name": str | None,
    "seen_as": str | None,
    "splits": dict[str, dict[str, Any]],
}
_SPLIT: dict[str, Any] = {
    "rows": float | None,
    "streamed": bool | None,
    "tokens": float | None,
    "supervised": float | None,
    "labels": dict[str, float] | None,
    "spreads": dict[str, dict[str, Any]],
}
_SPREAD: dict[str, Any] = {"median": float, "largest": float}
_LARGEST = 2**63

_WAITING = 256  # losses that may lie on a GPU before they are fetched at once


@dataclass
class TrainingRecord:
    """What is known of a training.

    Attributes:
        step: how many steps of the optimizer made the weights what they are.
        epoch_steps: how many steps make an epoch; None where that is not known.
        earlier: steps of trainings before this one, of which nothing else is known.
        setup: what one would write down of the run, pairs of a name and words: files sort what dictionaries hold.
        versions: of the packages that took part.
        monitor: the metric by which checkpoints are chosen.
        data: a summary of the data, in plain values.
        losses: ``[step, mean, batches]``: the training loss over stretches of steps that end there.
        metrics: ``[step, value]`` for each metric of an evaluation. They may go on behind `step`, where the weights are
            not those that the training ended with.
    """

    step: int = 0
    epoch_steps: int | None = None
    earlier: int = 0
    setup: list[list[str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    monitor: str | None = None
    data: dict[str, Any] | None = None
    losses: list[list[float]] = field(default_factory=list)
    metrics: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting: list[tuple[int, Tensor]] = []

    def add_loss(self, step: int, loss: Tensor) -> None:
        """Notes a batch's loss, without waiting for the device.

        Args:
            step: the optimizer's step that it belongs to.
            loss: a number.
        """
        self._waiting.append((step, loss.detach().float().mean()))
        if len(self._waiting) >= _WAITING:
            self.settle()

    def add_metrics(self, step: int, values: dict[str, float]) -> None:
        """Notes what an evaluation gave; what is not finite is left out.

        Args:
            step: how many steps of the optimizer came before it.
            values: metric to value.
        """
        for name, value in values.items():
            if math.isfinite(value):
                points = [p for p in self.metrics.get(name, []) if p[0] != step]
                self.metrics[name] = [*points, [step, value]]

    def settle(self) -> None:
        """Fetches the losses that wait on the device."""
        if not self._waiting:
            return
        steps, losses = zip(*self._waiting, strict=True)
        self._waiting = []
        found = [[s, v, 1] for s, v in zip(steps, torch.stack(losses).tolist(), strict=True) if math.isfinite(v)]
        self.losses = _binned([*self.losses, *found])

    def up_to(self, step: int) -> None:
        """Forgets what came after a step, from which a training goes on.

        Args:
            step: the last one that counts.
        """
        self.settle()
        self.step = step
        self.losses = [p for p in self.losses if p[0] <= step]
        self.metrics = {n: kept for n, points in self.metrics.items() if (kept := [p for p in points if p[0] <= step])}

    def at(self, step: int) -> Self:
        """The same training, told of the weights that it had at an earlier step.

        Args:
            step: which one.
        """
        self.settle()
        return replace(self, step=step)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        ends = [points[-1][0] for points in (self.losses, *self.metrics.values()) if points]
        return int(max([self.step, *ends]))

    @property
    def reached(self) -> dict[str, float]:
        """Each metric of these weights: its last value up to `step`."""
        found = {name: [v for s, v in points if s <= self.step] for name, points in self.metrics.items()}
        return {name: values[-1] for name, values in sorted(found.items()) if values}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        self.settle()
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record that `to_dict` gave.

        Args:
            values: what it gave; unknown entries are left out, so that files of later versions can be read.

        Raises:
            ValueError: if an entry is of another type than it gave.
        """
        known = {f.name for f in fields(cls)}
        record = cls(**{k: v for k, v in values.items() if k in known})
        check_types(record)
        measured = [p for points in record.metrics.values() for p in points]
        problems = [
            "setup must hold pairs" if any(len(pair) != 2 for pair in record.setup) else None,
            "losses must hold a step, a mean and a number above 0"
            if any(len(p) != 3 or p[0] < 0 or p[2] <= 0 for p in record.losses)
            else None,
            "metrics must hold a step and a value" if any(len(p) != 2 or p[0] < 0 for p in measured) else None,
            "step and earlier must be 0 or more" if min(record.step, record.earlier) < 0 else None,
            f"numbers must be below {_LARGEST:,}" if _has_larger(record.to_dict()) else None,
            *_problems_of_data(record.data or {}),
            *range_problems(record, counts=["epoch_steps"]),
        ]
        raise_problems("TrainingRecord", problems)
        return record


def _problems_of_data(data: dict[str, Any]) -> list[str]:
    """What a summary says that is not what it would say; what it leaves out, a model card leaves out too."""
    problems = _wrong("data", data, _DATA)
    for name, split in data.get("splits", {}).items() if not problems else ():
        found = _wrong(f"data.splits.{name}", split, _SPLIT)
        spreads = split.get("spreads", {}).values() if not found else ()
        if any(misfits(spread, _SPREAD) or not isinstance(spread.get("unit"), str | None) for spread in spreads):
            found.append(f"data.splits.{name}.spreads must hold a median, a largest and a unit")
        problems += found
    return problems


def _wrong(place: str, values: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    wrong = misfits(values, {k: hint for k, hint in hints.items() if k in values})
    return [f"{place}.{key} holds something else" for key in wrong]


def _has_larger(values: Any) -> bool:
    if isinstance(values, (dict, list)):
        return any(map(_has_larger, values.values() if isinstance(values, dict) else values))
    return isinstance(values, int) and abs(values) >= _LARGEST


def _binned(points: list[list[float]]) -> list[list[float]]:
    """Means over stretches of so many steps that there are at most `_POINTS` of them."""
    width = 1
    while points and points[-1][0] > width * _POINTS:
        width *= 2
    bins: dict[int, list[float]] = {}
    for step, value, count in points:
        _, mean, before = bins.get((int(step) - 1) // width, [0, 0.0, 0])
        bins[(int(step) - 1) // width] = [step, mean + (value - mean) * count / (before + count), before + count]
    return list(bins.values())
