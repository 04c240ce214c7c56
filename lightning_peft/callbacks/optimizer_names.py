"""Optimizer states that know the names of their parameters, so that a resumed run gives none to another one.

Optimizers number their parameters in the order in which they got them, and a state dict that is loaded goes by that
number alone. FSDP2's strategy numbers all of the module's parameters, frozen ones included, and takes any checkpoint
for one of its own. Checkpoints are written with the second kind of numbers under every strategy, which the first kind
of loading takes as well, and with the names beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

_STATES = "optimizer_states"
_RESUMED = "_peft_resumed_optimizers"

Names = list[list[str]]
"""An optimizer's parameters by name, a list for each of its groups."""


def number_by_module(checkpoint: dict[str, Any], module: LightningModule) -> list[Names] | None:
    """Numbers the parameters in a checkpoint's optimizer states as the module does, whatever strategy made them.

    Args:
        checkpoint: the checkpoint that is being made.
        module: the module that is saved.

    Returns:
        The names of what each optimizer holds, in the order of the states; None for a checkpoint without states.
    """
    if _STATES not in checkpoint:
        return None
    # a strategy that loads optimizers itself has the module's numbers already, or names
    renumber = module.trainer.strategy.lightning_restore_optimizer
    places = {id(p): i for i, p in enumerate(module.parameters())}
    names = [n for n, _ in module.named_parameters()]
    found = []
    for number, optimizer in enumerate(module.trainer.optimizers):
        state = checkpoint[_STATES][number]
        if renumber:
            own = [places[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state = checkpoint[_STATES][number] = _renumbered(state, own)
        groups = [group["params"] for group in state.get("param_groups", [])]
        found.append([[n if isinstance(n, str) else names[n] for n in group] for group in groups])
    return found


def note_resumed(checkpoint: dict[str, Any], names: list[Names] | None, module: LightningModule) -> None:
    """To be called when a checkpoint is loaded: has its optimizer states compared with the optimizers, by name.

    Args:
        checkpoint: the checkpoint.
        names: as `number_by_module` gave them.
        module: the module that goes on.

    Raises:
        ValueError: if a strategy that loads optimizers before this has loaded states of other parameters.
    """
    trainer = module._trainer
    if names is None or trainer is None or trainer.state.fn != "fit":
        return
    if trainer.strategy.lightning_restore_optimizer:
        module.__dict__[_RESUMED] = checkpoint, names  # there are no optimizers yet
    else:  # by name
        _compare(names, module)
        _forget_what_was_not_saved(checkpoint, names, module)


def match_resumed(module: LightningModule) -> None:
    """To be called in ``on_fit_start``: puts states in the order in which the optimizers hold their parameters.

    Args:
        module: the module that goes on.

    Raises:
        ValueError: if an optimizer holds other parameters than the one that was saved, or has them in other groups.
    """
    checkpoint, names = module.__dict__.pop(_RESUMED, ({}, []))
    if _STATES not in checkpoint or module.trainer.ckpt_path is None:  # it was loaded for something else
        return
    for state, saved, own in zip(checkpoint[_STATES], names, _compare(names, module), strict=True):
        for group, before, now in zip(state["param_groups"], saved, own, strict=True):
            numbers = dict(zip(before, group["params"], strict=True))
            group["params"] = [numbers[name] for name in now]


def _forget_what_was_not_saved(checkpoint: dict[str, Any], names: list[Names], module: LightningModule) -> None:
    """Takes back the states that loading has made for parameters without one, such as those not unfrozen yet.

    They would be a step old when their first one comes.
    """
    parameters = dict(module.named_parameters())
    saved = zip(checkpoint.get(_STATES, ()), names, module.trainer.optimizers, strict=False)
    for state, groups, optimizer in saved:
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        for number, name in zip(numbers, [n for group in groups for n in group], strict=True):
            if not state["state"].get(number):
                optimizer.state.pop(parameters[name], None)


def _compare(names: list[Names], module: LightningModule) -> list[Names]:
    """What the module's optimizers hold, if that is what is named."""
    optimizers = module.trainer.optimizers
    if len(optimizers) != len(names):
        raise ValueError(f"the checkpoint has {len(names)} optimizers, and this module {len(optimizers)}")
    mine = [_held(module, optimizer) for optimizer in optimizers]
    for saved, own in zip(names, mine, strict=True):
        _refuse_other_parameters(saved, own)
    return mine


def _held(module: LightningModule, optimizer: Optimizer) -> Names:
    names = {id(p): n for n, p in module.named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def _refuse_other_parameters(saved: Names, own: Names) -> None:
    """Compares what an optimizer held with what it holds; the order within a group is free."""
    if [sorted(group) for group in saved] == [sorted(group) for group in own]:
        return
    before, now = {n for g in saved for n in g}, {n for g in own for n in g}
    differences = [*_listed("only in the checkpoint", before - now), *_listed("only here", now - before)]
    if not differences:
        sizes = f"{[len(g) for g in saved]} in the checkpoint, {[len(g) for g in own]} here"
        differences = [f"the same {len(now)} parameters are in other groups ({sizes})"]
    raise ValueError(
        "the optimizer's states in the checkpoint are of other parameters than this optimizer holds: "
        + "; ".join(differences)
        + ". Build the optimizer as before, or load the weights alone and begin a new run"
    )


def _renumbered(state: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    # a parameter without a state has an empty one: who takes numbers for names looks at the first
    states = {numbers[i]: state["state"].get(i, {}) for i in range(len(numbers))}
    groups = [{**g, "params": [numbers[i] for i in g["params"]]} for g in state["param_groups"]]
    return {**state, "state": states, "param_groups": groups}


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    return [f"{what}: {', '.join(found[:4])}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")]
