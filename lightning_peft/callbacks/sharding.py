"""An adapted model cut into shards, one for each process of Lightning's ModelParallelStrategy (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from torch.nn import Module

from lightning_peft.core.matching import class_of
from lightning_peft.core.method import Method
from lightning_peft.core.sharded import sharded_modules
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
