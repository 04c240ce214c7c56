"""Adapters in a model of which tensor parallelism has split layers over processes (``parallelize_module``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import is_within
from lightning_peft.core.method import Method
from lightning_peft.core.sharded import is_sharded


def refuse_split(
    parameters: Mapping[str, Parameter],
    method: Method,
    layers: Mapping[str, AdapterLayer],
    in_place: Sequence[str],
    copies: Sequence[str],
) -> None:
    """Refuses, in a model with layers that are split, what would not become the same in all processes.

    Args:
        parameters: the base's.
        method: what is to be injected.
        layers: its layers by module.
        in_place: parameters that are to train in place.
        copies: modules of which copies are to train.

    Raises:
        ValueError: if that is anything but layers that can be split, and copies of what is whole.
    """
    split = [n for n, p in parameters.items() if is_sharded(p)]
    if not split:
        return
    others = [*(n for n, layer in layers.items() if not layer.splits), *in_place]
    others += [n for n in copies if any(is_within(p, [n]) for p in split)]
    if others:
        raise ValueError(
            f"{type(method).__name__}: {others[0]!r} cannot train like this, since {split[0]!r} is split over "
            "processes (parallelize_module); there only LoRA on linear modules trains, and modules_to_save that are "
            "whole"
        )


@torch.no_grad()
def share_whole(parameters: Mapping[str, Parameter], layers: Mapping[str, AdapterLayer]) -> None:
    """Gives what is whole in new layers of a split model the first process's numbers: each draws by itself.

    Args:
        parameters: the base's; where none is split, nothing is done.
        layers: the new layers.
    """
    split = next((p for p in parameters.values() if is_sharded(p)), None)
    if split is None:
        return
    for layer in layers.values():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if not is_sharded(tensor):
                tensor.copy_(_shared(tensor, split))


def _shared(tensor: Tensor, split: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = split.device_mesh
    return distribute_tensor(tensor.detach(), mesh, [Replicate()] * mesh.ndim).to_local()
