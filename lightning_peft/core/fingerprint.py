"""Which base an adapter belongs to, as a short hash of names, shapes and a few values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch.nn import Module

_SAMPLES = 8


def fingerprint(model: Module, without: Iterable[str] = ()) -> str | None:
    """A hash that two bases share only if they are the same model.

    Eight evenly spaced values of each parameter count, rounded to bfloat16, so that the same base loaded in
    bfloat16 or float32 gives the same hash.

    Args:
        model: the base, before anything in it trains.
        without: parameters that are no part of the base, such as a new head with random values.

    Returns:
        16 hexadecimal digits, or None where a value cannot be read (weights offloaded to the meta device).
    """
    left_out = set(without)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if name in left_out:
            continue
        if tensor.is_meta:
            return None
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if flat.numel():
            chosen = torch.arange(_SAMPLES, device=flat.device) * (flat.numel() - 1) // (_SAMPLES - 1)
            digest.update(flat[chosen].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
