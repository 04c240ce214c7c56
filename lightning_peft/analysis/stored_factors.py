"""The factors of a LoRA as they lie in its file: read without the base that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.core.method import Method
from lightning_peft.methods.lora import LoRA

_A = re.compile(r"(?:base_model\.model\.)?(?P<place>.+)\.(?:lora|lora_embedding)_A(?:\.weight)?")


@dataclass(frozen=True)
class StoredFactors:
    """A pair of factors.

    Attributes:
        place: the name of the module in the base.
        owner: the module by whose name its rank and strength are looked up; another one inside ``MultiheadAttention``.
        keys: the names of A and B in the file.
        a: ``(r, in)``; of a convolution the kernel's places beside the input channels.
        b: ``(out, r)``, without the strength.
        scale: the strength.
    """

    place: str
    owner: str
    keys: tuple[str, str]
    a: Tensor
    b: Tensor
    scale: float

    @property
    def product(self) -> tuple[Tensor, Tensor]:
        """A and B, the strength in the latter, in float64."""
        return self.a.double(), self.b.double() * self.scale


def no_factors(method: Method) -> str | None:
    """Why a file of this method holds no factors whose product is a change of a weight; None if it does.

    Args:
        method: the file's method.
    """
    if not isinstance(method, LoRA):
        return f"{type(method).__name__} is no LoRA, of which the factors alone say what it changes"
    if method.target_parameters:
        return "the factors of bare parameters (target_parameters) are of stacks, which the base alone tells apart"
    return None


def stored_factors(method: Method, tensors: Mapping[str, Tensor]) -> list[StoredFactors]:
    """The pairs of factors in a LoRA's file, in order of their names.

    Args:
        method: the file's method.
        tensors: those of the file.

    Raises:
        ValueError: if the method has no such factors (`no_factors`), or a pair is none.
    """
    problem = no_factors(method)
    if problem is not None:
        raise ValueError(problem)
    assert isinstance(method, LoRA)
    found = []
    for key in sorted(tensors, key=_in_order):
        match = _A.fullmatch(key)
        if match is None:
            continue
        place, other = match["place"], re.sub(r"_A(?=(?:\.weight)?$)", "_B", key)
        if other not in tensors:
            raise ValueError(f"{key} has no {other} beside it")
        a, b = tensors[key].flatten(1), tensors[other].flatten(1)
        if b.shape[1] != len(a):
            raise ValueError(f"{key} has {len(a)} rows, but {other} {b.shape[1]} columns: they have no product")
        owner, below, child = place.partition(".base_layer.")
        own = place.replace(".base_layer.", ".") if below else place
        # peft writes the output projection of MultiheadAttention below the module whose options it shares
        owner = owner if child == "out_proj" else own
        found.append(StoredFactors(own, owner, (key, other), a, b, method.scale(owner)))
    if not found:
        raise ValueError("its file holds no lora_A and lora_B")
    return found


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Names with layer 10 behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
