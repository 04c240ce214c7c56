"""An adapted model under Lightning's ModelParallelStrategy (FSDP2): shards of it, and what is the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed
from torch.nn import Module

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.matching import class_of
from lightning_peft.core.method import Method
from lightning_peft.core.sharded import is_sharded, sharded_modules
from lightning_peft.methods.selective import Selective

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: LightningModule, model: Module, method: Method) -> None:
    """Shards a model over the processes that share the data, each of its blocks by itself, under FSDP2's strategy.

    Its adapters go with the root: they are small, and they train. To be called when they are in.

    Args:
        module: the module that is trained; under other strategies nothing is done.
        model: the Hugging Face model in it.
        method: that of its adapter.

    Raises:
        ValueError: if the strategy is to split single layers too, or could not resume what it saves.
    """
    mesh: DeviceMesh | None = getattr(module, "_device_mesh", None)
    if mesh is None or sharded_modules(model):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"PeftModule shards models and does not split their layers, but got tensor_parallel_size="
            f"{mesh['tensor_parallel'].size()}; take ModelParallelStrategy(data_parallel_size={mesh.size()}, "
            "tensor_parallel_size=1), or call parallelize_module, adapt and fully_shard, in this order, in the "
            "configure_model of a module of your own"
        )
    saves_shards = getattr(module.trainer.strategy, "_save_distributed_checkpoint", False)
    if saves_shards and isinstance(method, Selective) and method.scheduled:
        raise ValueError(
            "while layers wait to be unfrozen the optimizer has no state for them, without which a checkpoint of "
            "shards cannot be resumed; take ModelParallelStrategy(..., save_distributed_checkpoint=False)"
        )
    from torch.distributed.fsdp import fully_shard

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for part in [m for m in model.modules() if class_of(m).__name__ in blocks]:
        fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


@torch.no_grad()
def share_buffers(module: LightningModule, model: Module) -> None:
    """Gives the fixed tensors of adapters the first process's numbers, which DDP does by itself and FSDP2 does not.

    Each process draws them with a generator of its own, and only parameters are sharded.

    Args:
        module: the module that is trained; under other strategies than FSDP2's nothing is done.
        model: what is adapted in it.
    """
    strategy, adapters = getattr(module._trainer, "strategy", None), adapters_of(model)
    if not isinstance(strategy, ModelParallelStrategy) or adapters is None:
        return
    for buffer in adapters.buffers():
        if not (buffer.is_meta or is_sharded(buffer)):
            sent = buffer.to(strategy.root_device)  # NCCL takes none on the CPU, where the model may still be
            distributed.broadcast(sent, 0)
            buffer.copy_(sent)
