"""Whether what is to train does: parameters that no optimizer holds, or that no gradient reaches."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_peft.handle import Adapter

_REMEDY = (
    "collect them in configure_optimizers, which runs after the module is adapted: "
    "torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])"
)


def check_optimizers(optimizers: Iterable[Optimizer], module: LightningModule, adapter: Adapter) -> None:
    """Compares what trains with what the optimizers hold: parameters collected too early are those of the base.

    Args:
        optimizers: those of the trainer.
        module: the module, adapted.
        adapter: its adapter.

    Raises:
        ValueError: if none of the adapter's parameters is in an optimizer; some, or others, only give a warning.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not any(id(p) in held for p in module.parameters()):
        return  # there is no optimizer, or a sharding strategy has put parameters of its own in
    own = adapter.parameters()
    if own and not any(id(p) in held for p in own):
        raise ValueError(
            f"none of the adapter's {len(own)} trainable parameters is in an optimizer, so it would not learn; "
            + _REMEDY
        )
    without = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if without:
        rank_zero_warn(
            f"{len(without)} trainable parameters are in no optimizer: {_first(without)}. They do not learn; {_REMEDY}"
        )


def warn_of_missing_gradients(module: LightningModule) -> None:
    """Names the trainable parameters that the first backward pass gave no gradient.

    Args:
        module: the module, after its first backward.
    """
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        rank_zero_warn(
            f"no gradient reached {len(without)} trainable parameters: {_first(without)}. They do not learn; leave "
            "their modules out (exclude_modules), or see why the loss does not depend on them."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
