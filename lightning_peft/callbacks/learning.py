"""Whether what is to train does, and is saved: parameters in no optimizer, without a gradient, or in no checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_peft.core.partial_state import PartialState
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


def refuse_unsaved(optimizer: Optimizer, module: LightningModule, saved: set[int]) -> None:
    """Refuses to train what checkpoints leave out as the frozen base: layers unfrozen or added behind the method.

    To be called before each step, since unfreezing may come at any of them.

    Args:
        optimizer: the one that is about to step.
        module: the module, adapted.
        saved: ids of parameters that were looked at before; what is found is added.

    Raises:
        ValueError: if the optimizer holds trainable parameters of the base that the method does not train.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if held <= saved:
        return
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    hooks = [hook for hook in module._state_dict_hooks.values() if isinstance(hook, PartialState)]
    every = [name for own in names.values() for name in own]
    left_out = {name for hook in hooks for name in hook.untouched(module, every)}
    # one that is tied to something that is saved comes back with that
    lost = [own[0] for i, own in names.items() if i in held and left_out.issuperset(own)]
    if lost:
        raise ValueError(_unsaved(lost, hooks[0].base))
    loose = len(held - names.keys() - saved)
    if loose and held & names.keys():  # else a sharding strategy has put parameters of its own in
        rank_zero_warn(
            f"{loose} of the parameters that an optimizer trains belong to no module, so no checkpoint holds them; "
            "register them in the LightningModule: self.name = torch.nn.Parameter(...)"
        )
    saved |= held


def _unsaved(names: list[str], base: str) -> str:
    modules = list(dict.fromkeys(n.removeprefix(base).rpartition(".")[0] for n in names))
    known = [m for m in modules if m][:3]
    train = f"modules_to_save={known} has it train them in full" if known else "Selective() trains the base's own"
    return (
        f"{len(names)} parameters of the frozen base are trainable and in an optimizer, but no checkpoint would hold "
        f"them: {_first(names)}. They were unfrozen or added behind the method's back; {train}, and what lies outside "
        "the adapted submodule (model=...) is saved as a whole. If they are not to train, set requires_grad_(False)"
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
