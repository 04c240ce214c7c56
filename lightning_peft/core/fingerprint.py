"""Which base an adapter belongs to, as a short hash of names, shapes and a few values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapters import Adapters
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.matching import is_within
from lightning_peft.core.quantized import codes
from lightning_peft.core.sharded import whole

_SAMPLES = 8
_HALF = 8


def parameter_digests(model: Module) -> dict[str, tuple[str, str | None]]:
    """What a fingerprint is made of, for each parameter by name: its shape, and a hash of a few of its values.

    Eight evenly spaced values of each parameter count, rounded to bfloat16, so that the same base loaded in
    bfloat16 or float32 gives the same hash. Of a quantized one they are codes.

    Args:
        model: the base, before anything in it trains.

    Returns:
        Shape and hash; None instead of the hash where values cannot be read (offloaded to the meta device).
    """
    return _digests(base_parameters(model))


def renew_digests(adapters: Adapters, parameters: dict[str, Parameter], changed: Collection[str]) -> None:
    """Makes the base what it has become for good: adapters that are saved from now on belong to that.

    Args:
        adapters: the model's adapters.
        parameters: the base's by name, one that has several names by the first. A tie may have been untied.
        changed: names of those that have other values for good.
    """
    known = adapters.base_digests.keys() - set(changed)
    renewed = _digests({n: p for n, p in parameters.items() if n not in known})
    adapters.base_digests = {n: renewed[n] if n in renewed else adapters.base_digests[n] for n in parameters}


def _digests(parameters: dict[str, Parameter]) -> dict[str, tuple[str, str | None]]:
    empty: dict[str, str | None] = {n: None if p.is_meta else "" for n, p in parameters.items()}
    read = {n: codes(p) for n, p in parameters.items() if p.numel() and not p.is_meta}
    values = dict(zip(read, _hashes(list(read.values())), strict=True))
    shapes = {shape: str(tuple(shape)) for shape in {p.shape for p in parameters.values()}}
    return {n: (shapes[p.shape], values.get(n, empty[n])) for n, p in parameters.items()}


@torch.no_grad()
def _hashes(tensors: list[Tensor]) -> list[str]:
    """A hash of evenly spaced values of each tensor; those of one device come over from it together."""
    places = {n: torch.arange(_SAMPLES) * (n - 1) // (_SAMPLES - 1) for n in {t.numel() for t in tensors}}
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    found = [""] * len(tensors)
    for (device, _), here in kinds.items():
        there = {n: p.to(device) for n, p in places.items()}
        chosen = torch.stack([_values(tensors[i], there[tensors[i].numel()]) for i in here]).to(torch.bfloat16)
        for i, row in zip(here, chosen.cpu().view(torch.int16).numpy(), strict=True):
            found[i] = hashlib.sha256(row.tobytes()).hexdigest()
    return found


def _values(tensor: Tensor, places: Tensor) -> Tensor:
    """Values at places of the flattened tensor; 8 bits and subclasses know the slower of two ways only."""
    tensor = whole(tensor)  # one at a time
    plain = type(tensor) is Parameter and tensor.itemsize > 1
    return torch.take(tensor, places) if plain else tensor.reshape(-1)[places]


def fingerprint(digests: dict[str, tuple[str, str | None]], without: Collection[str]) -> str | None:
    """A hash that two bases share only if they are the same model, but for some of their parameters.

    Args:
        digests: of the base's parameters.
        without: names of parameters that do not count: what is saved beside the fingerprint may start at any values.

    Returns:
        16 hexadecimal digits, the first half for names and shapes and the second for values; or None where a value
        cannot be read.
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    left_out = set(without)
    for name in sorted(digests.keys() - left_out):
        shape, value = digests[name]
        if value is None:
            return None
        structure.update(f"{name}{shape}".encode())
        values.update(value.encode())
    return structure.hexdigest()[:_HALF] + values.hexdigest()[:_HALF]


def same_structure(first: str, second: str) -> bool:
    """Whether two fingerprints differ in values alone.

    Args:
        first: as `fingerprint` gives it.
        second: another.
    """
    return first[:_HALF] == second[:_HALF]


def saved_parameters(adapters: Adapters, names: Iterable[str]) -> list[str]:
    """The base's parameters of which adapters need no value: each adapter runs a copy, or they train in place.

    Args:
        adapters: the model's adapters.
        names: those that are saved together.
    """
    records = [adapters.trees[name].record for name in names]
    saved = {key for record in records for key in record.in_place} & adapters.base_digests.keys()
    copies = [set(record.copies) for record in records]
    if all(copies):
        saved |= {key for key in adapters.base_digests if all(is_within(key, c) for c in copies)}
    return sorted(saved)
