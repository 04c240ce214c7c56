"""What GPUs have: their memory, and how fast they multiply at best."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.core.problems import nearest

RESERVE = 800_000_000
"""Bytes of a card that no tensor gets: CUDA's context, the workspaces of its libraries, gaps between tensors."""

REACHED = 0.4
"""The share of a card's best rate that training reaches; 30 to 50% is usual, small models and batches reach less."""


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as people call it.
        memory: bytes, as torch gives them, which is less than what the card is sold by.
        rate_16: operations a second of dense products in 16 bits, added up in 32, by NVIDIA's data sheet.
        rate_32: the same in 32 bits, as torch takes them by default (no TF32).
        has_bf16: whether it multiplies in bfloat16 by itself, which otherwise takes as long as 32 bits or longer.
    """

    name: str
    memory: int
    rate_16: float
    rate_32: float
    has_bf16: bool

    def seconds(self, operations: int, precision: str) -> float:
        """How long operations take where `REACHED` of the best rate is reached.

        Args:
            operations: how many.
            precision: the Trainer's.
        """
        is_fast = precision.startswith("16") or (precision.startswith("bf16") and self.has_bf16)
        return operations / (REACHED * (self.rate_16 if is_fast else self.rate_32))


def _gpu(name: str, gib: float, rate_16: float, rate_32: float, *, has_bf16: bool = True) -> Gpu:
    return Gpu(name, int(gib * 2**30), rate_16 * 1e12, rate_32 * 1e12, has_bf16)


KNOWN = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 14.6, 65, 8.1, has_bf16=False),
        _gpu("V100-32GB", 31.7, 125, 15.7, has_bf16=False),
        _gpu("RTX3090", 23.6, 71, 35.6),
        _gpu("RTX4090", 23.5, 165, 82.6),
        _gpu("RTX5090", 31.3, 209, 104.8),
        _gpu("L4", 22.0, 121, 30.3),
        _gpu("L40S", 44.4, 362, 91.6),
        _gpu("A100-40GB", 39.4, 312, 19.5),
        _gpu("A100-80GB", 79.1, 312, 19.5),
        _gpu("H100-80GB", 79.1, 989, 67),
        _gpu("H200", 139.8, 989, 67),
        _gpu("B200", 178.3, 2250, 75),
    )
}


def gpus_named(names: str | list[str] | None) -> list[Gpu]:
    """Cards by name, those with the least memory first.

    Args:
        names: one or some of `KNOWN`, in letters of any case, without its memory where one card alone has
            the name. None is all.

    Raises:
        ValueError: if one is unknown, or the name of cards with more and with less memory.
    """
    names = [names] if isinstance(names, str) else names
    if names == []:
        raise ValueError("gpus is empty; name some, or leave it out to have all that are known")
    found = list(KNOWN.values()) if names is None else [_named(str(name)) for name in names]
    return sorted(dict.fromkeys(found), key=lambda gpu: gpu.memory)


def _named(name: str) -> Gpu:
    exact = [known for known in KNOWN if known.lower() == name.lower()]
    begun = exact or [known for known in KNOWN if known.lower().startswith(f"{name.lower()}-")]
    if not begun:
        raise ValueError(f"gpus: {name!r} is unknown{nearest(name, KNOWN)}")
    if len(begun) > 1:
        raise ValueError(f"gpus: {name!r} may be {' or '.join(begun)}; write which")
    return KNOWN[begun[0]]
