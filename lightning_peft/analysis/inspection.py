"""What an adapter's folder or checkpoint holds and what it does to its base, put together for the screen and a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.analysis.change import Change
from lightning_peft.formats.tensor_file import Entry


@dataclass(frozen=True)
class Inspection:
    """An adapter as it lies on the disk, and its changes.

    Attributes:
        path: the folder or checkpoint, as it was given.
        method: the method's name.
        options: its options.
        base: what the file says of its base: ``name``, ``fingerprint``.
        tensors: shape and dtype of each tensor, by its name in the file.
        size: bytes on the disk.
        changes: of the base's weights, in the model's order.
        matrices: of a method that changes no weight, its own.
        notes: sentences on what could not be told, and why.
    """

    path: str
    method: str
    options: dict[str, Any]
    base: dict[str, Any]
    tensors: Mapping[str, Entry]
    size: int
    changes: tuple[Change, ...] = ()
    matrices: tuple[Change, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def numbers(self) -> int:
        """How many numbers the file holds."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    @property
    def shown(self) -> tuple[Change, ...]:
        """The changes, or where there are none the method's own matrices."""
        return self.changes or self.matrices

    @property
    def has_base(self) -> bool:
        """Whether the weights were there that the changes are compared with."""
        return any(change.weight_norm is not None for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``inspect.json``."""
        tensors = {
            n: {"shape": list(e.shape), "dtype": str(e.dtype).removeprefix("torch.")} for n, e in self.tensors.items()
        }
        return {
            "schema": 1,
            "path": self.path,
            "method": self.method,
            "options": self.options,
            "base": self.base,
            "parameters": self.numbers,
            "bytes": self.size,
            "tensors": tensors,
            "relative": relative(self.changes),
            "changes": {c.name: c.to_dict() for c in self.changes},
            "own_matrices": {c.name: c.to_dict() for c in self.matrices},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Kind:
    """Changes of modules that differ by their layer alone, together.

    Attributes:
        name: their name within the layer.
        changes: of each layer.
    """

    name: str
    changes: tuple[Change, ...]

    @property
    def relative(self) -> float | None:
        """The norm of all their changes relative to that of all their weights."""
        return relative(self.changes)

    @property
    def norm(self) -> float:
        """The norm of all their changes."""
        return _norm(c.norm for c in self.changes)

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank that would do; 0 of vectors."""
        ranks = [c.rank for c in self.changes if len(c.shape) > 1]
        return min(ranks, default=0), max(ranks, default=0)

    @property
    def capacity(self) -> int:
        """The highest rank that there is room for; 0 of vectors."""
        return max((c.capacity for c in self.changes if len(c.shape) > 1), default=0)


def kinds(changes: Iterable[Change]) -> list[Kind]:
    """Changes by the kind of their module, in order.

    Args:
        changes: the changes.
    """
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.kind, []).append(change)
    return [Kind(name, tuple(of)) for name, of in found.items()]


def relative(changes: Iterable[Change]) -> float | None:
    """The norm of changes together, relative to that of their weights; None without weights.

    Args:
        changes: the changes; those without a weight do not count.
    """
    with_weight = [c for c in changes if c.weight_norm]
    return (
        _norm(c.norm for c in with_weight) / _norm(c.weight_norm or 0.0 for c in with_weight) if with_weight else None
    )


def capacity_line(changes: Iterable[Change]) -> str | None:
    """How much of the rank is used, in a sentence; None where no change has a rank.

    Args:
        changes: the changes.
    """
    matrices = [c for c in changes if len(c.shape) > 1]
    ranked = [c for c in matrices if c.factored] or matrices
    if not ranked:
        return None
    low, high = min(c.rank for c in ranked), max(c.rank for c in ranked)
    span = f"{high}" if low == high else f"{low} to {high}"
    if not ranked[0].factored:
        return f"99% of the squared norm needs a rank of {span}"
    room, most, used = sum(c.capacity for c in ranked), max(c.capacity for c in ranked), sum(c.rank for c in ranked)
    everywhere = f"; r={high} would do everywhere" if len(ranked) > 1 and high < most else ""
    return (
        f"99% of the squared norm needs a rank of {span} of {most} ({used:,} of {room:,} directions, "
        f"{room - used:,} unused){everywhere}"
    )


def shared_prefix(names: Iterable[str]) -> str:
    """What all dotted names begin with, to its last dot; ``""`` of one name or none.

    Args:
        names: the names.
    """
    listed = [name.split(".")[:-1] for name in names]
    if len(listed) < 2:
        return ""
    count = 0
    for parts in zip(*listed, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return "".join(f"{part}." for part in listed[0][:count])


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(v * v for v in values))
