"""Tensors of which each process holds a part (DTensor)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed
from torch.nn import Module


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask for it.

    Args:
        tensor: any; one that is not sharded is given back.
    """
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor, or all of it as one of several that share it."""
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds.

    Args:
        tensor: any; one that is not sharded is given back.
    """
    local: Any = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, cut as another one is.

    Args:
        tensor: the tensor.
        other: of the same shape; where it is whole, nothing is done.
    """
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


def cut_along(tensor: Tensor, other: Tensor, dim: int) -> Tensor:
    """A whole tensor cut along one dimension where another tensor is cut along that, and the same elsewhere.

    Args:
        tensor: the tensor; of several processes' the first one's numbers are taken.
        other: a DTensor that has as many entries there.
        dim: the dimension.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded: Any = other
    placements = [p if p.is_shard(dim) else Replicate() for p in sharded.placements]
    return distribute_tensor(tensor, sharded.device_mesh, placements)


def sharded_modules(model: Module) -> list[Any]:
    """The modules that FSDP2 has sharded, outermost first.

    Args:
        model: the root.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: Module) -> None:
    """Makes FSDP2 forget the whole parameters that it has gathered: what is changed are the shards.

    After a forward without a backward pass the root keeps them, and would run the next one with them.

    Args:
        model: the root; one that is not sharded is left alone.
    """
    for module in sharded_modules(model):
        module.reshard()


def is_split(module: Module) -> bool:
    """Whether ``parallelize_module`` has split a module's own parameters over processes.

    Args:
        module: any module; those below it are not looked at.
    """
    return any(p is not None and is_sharded(p) for p in module._parameters.values())


def refuse_sharded(model: Module, call: str) -> None:
    """Refuses what needs whole tensors.

    Args:
        model: the root.
        call: what was called.

    Raises:
        RuntimeError: if the model is sharded.
    """
    if sharded_modules(model) or any(map(is_split, model.modules())):
        raise RuntimeError(
            f"{call} needs whole tensors, and this model is sharded over processes; save a checkpoint, and load that "
            "in one process"
        )
