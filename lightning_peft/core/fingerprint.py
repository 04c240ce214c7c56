"""Which base an adapter belongs to, as a short hash of names, shapes and all values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from lightning_peft.core.adapters import Adapters
from lightning_peft.core.matching import is_within
from lightning_peft.core.quantized import codes
from lightning_peft.core.sharded import is_sharded, whole

_HALF = 8
_ROW = 1024
"""Values that are added up before their place counts."""

_AT_ONCE = 2**18
"""Values that are rounded at once: their copy stays in a processor's cache, which makes reading three times as fast."""

_STEP = 0x3C6EF372FE94F82A  # an even number of 62 bits without a pattern


@torch.no_grad()
def parameter_digests(parameters: dict[str, Parameter]) -> dict[str, tuple[str, str | None]]:
    """What a fingerprint is made of, for each parameter by name: its shape, and a sum over all of its values.

    Values count as they are in bfloat16, so that the same base loaded in bfloat16 or float32 gives the same sums. Of a
    quantized one they are codes. The sums are of whole numbers, and so the same on every machine and in every order:
    the codes of each four values as one of 64 bits, each row of 1,024 values times an odd number of its own, modulo
    ``2**64``. So any value that changes in bfloat16 changes the sum.

    Args:
        parameters: the base's by name, before anything in it trains; one that has several names by the first.

    Returns:
        Shape and sum; None instead of the sum where no values can be read (offloaded to the meta device, or fake).
    """
    values: dict[str, str | None] = {}
    read: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        unread = parameter.is_meta or hasattr(parameter, "fake_mode")  # which PyTorch's fake tensors have
        if unread or not parameter.numel():
            values[name] = None if unread else ""
        elif is_sharded(parameter):  # put together one at a time: all may be more than a process can hold
            values[name] = _sums([whole(parameter)])[0]
        else:
            read[name] = _stored(parameter)
    values |= zip(read, _sums(list(read.values())), strict=True)
    shapes = {shape: str(tuple(shape)) for shape in {p.shape for p in parameters.values()}}
    return {n: (shapes[p.shape], values[n]) for n, p in parameters.items()}


def renew_digests(adapters: Adapters, parameters: dict[str, Parameter], changed: Collection[str]) -> None:
    """Makes the base what it has become for good: adapters that are saved from now on belong to that.

    Args:
        adapters: the model's adapters.
        parameters: the base's by name, one that has several names by the first. A tie may have been untied.
        changed: names of those that have other values for good.
    """
    known = adapters.base_digests.keys() - set(changed)
    renewed = parameter_digests({n: p for n, p in parameters.items() if n not in known})
    adapters.base_digests = {n: renewed[n] if n in renewed else adapters.base_digests[n] for n in parameters}


def _stored(parameter: Parameter) -> Tensor:
    """What lies in memory for a parameter."""
    held = codes(parameter)
    return torch.view_as_real(held) if held.dtype.is_complex else held


def _sums(tensors: list[Tensor]) -> list[str]:
    """The sum of each tensor's values; those of one device come over from it together."""
    kinds: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(i)
    sums: dict[torch.device, list[Tensor]] = {}
    order: dict[torch.device, list[int]] = {}
    for (device, _, shape), alike in kinds.items():
        each = max(1, _AT_ONCE // shape.numel())
        for begin in range(0, len(alike), each):
            some = alike[begin : begin + each]
            sums.setdefault(device, []).append(_sum_of_each([tensors[i] for i in some]))
            order.setdefault(device, []).extend(some)
    found = [""] * len(tensors)
    for device, parts in sums.items():
        for i, value in zip(order[device], torch.cat(parts).tolist(), strict=True):
            found[i] = f"{value & (2**64 - 1):016x}"
    return found


def _sum_of_each(tensors: list[Tensor]) -> Tensor:
    """The sums of tensors of one shape, ``(n,)``: many small ones together, a large one bit by bit."""
    if len(tensors) > 1:
        return _sum_of_rows(torch.stack(tensors).view(len(tensors), -1), 0)
    flat = tensors[0].reshape(1, -1)
    # a GPU has no such cache, and takes its time for each call
    size = _AT_ONCE if flat.device.type == "cpu" else 2**26
    starts = range(0, flat.shape[1], size)
    return torch.stack([_sum_of_rows(flat[:, i : i + size], i // _ROW) for i in starts]).sum(0)


def _sum_of_rows(values: Tensor, first: int) -> Tensor:
    """``(n, values)`` -> ``(n,)``, of which the first row of 1,024 is the ``first`` of its tensor."""
    rounded = values.to(torch.bfloat16)
    missing = -rounded.shape[1] % _ROW
    if missing or not rounded.is_contiguous() or rounded.storage_offset() % 4:
        rounded = F.pad(rounded, (0, missing)).contiguous()
        rounded = rounded.clone() if rounded.storage_offset() % 4 else rounded
    rows = rounded.view(-1).view(torch.int64).view(len(values), -1, _ROW // 4).sum(2)
    # each place's factor is odd, so that no difference is lost
    factors = torch.arange(first, first + rows.shape[1], device=rows.device) * _STEP + 1
    return (rows * factors).sum(1)


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


OF_NOTHING = fingerprint({}, ())
"""What a base has whose parameters all train: by it no base is told from another."""


def fingerprints_of_parts(digests: dict[str, tuple[str, str | None]], without: Collection[str]) -> dict[str, str]:
    """The fingerprint of each layer, and of each module outside the layers, so that it can be said what differs.

    Args:
        digests: of the base's parameters.
        without: names of parameters that do not count.

    Returns:
        By name, such as ``"model.layers.3"`` or ``"lm_head"``; parts of which a value cannot be read are left out.
    """
    parts: dict[str, dict[str, tuple[str, str | None]]] = {}
    for name in digests.keys() - set(without):
        parts.setdefault(_part(name), {})[name] = digests[name]
    found = {part: fingerprint(own, ()) for part, own in parts.items()}
    return {part: found[part] or "" for part in sorted(found) if found[part]}


def _part(name: str) -> str:
    """A parameter's layer: its name up to the first number; without one, its module."""
    layer = re.match(r".*?\.\d+(?=\.)|\d+(?=\.)", name)
    return layer.group() if layer else name.rpartition(".")[0] or name


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
