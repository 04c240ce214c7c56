"""Optimizer states that know the names of their parameters, so that a resumed run gives none to another one.

Optimizers number their parameters in the order in which they got them, and a state dict that is loaded goes by that
number alone. FSDP2's strategy numbers all of the module's parameters, frozen ones included, and takes any checkpoint
for one of its own. Checkpoints are written with the second kind of numbers under every strategy, which the first kind
of loading takes as well, and with the names beside them. Optimizers whose states are laid out in a way of their own are
saved as they are, without names.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule
from torch.nn import Parameter
from torch.optim import Optimizer

_STATES = "optimizer_states"
_RESUMED = "_peft_resumed_optimizers"

Names = list[list[str]]
"""An optimizer's parameters by name, a list for each of its groups; ``?0``, ``?1`` and so on are in no module."""


def number_by_module(checkpoint: dict[str, Any], module: LightningModule) -> list[Names | None] | None:
    """Numbers the parameters in a checkpoint's optimizer states as the module does, whatever strategy made them.

    Args:
        checkpoint: the checkpoint that is being made.
        module: the module that is saved.

    Returns:
        The names of what each optimizer holds, in the order of the states, or None for one whose state is of a layout
        of its own; None for a checkpoint without states.
    """
    if _STATES not in checkpoint:
        return None
    # a strategy that loads optimizers itself has the module's numbers already, or names
    renumber = module.trainer.strategy.lightning_restore_optimizer
    names = [n for n, _ in module.named_parameters()]
    found: list[Names | None] = []
    for number, optimizer in enumerate(module.trainer.optimizers):
        state = checkpoint[_STATES][number]
        if not renumber:
            groups = [group["params"] for group in state.get("param_groups", [])]
            found.append([[n if isinstance(n, str) else names[n] for n in group] for group in groups])
        elif _is_torchs(state, optimizer):
            checkpoint[_STATES][number] = _renumbered(state, optimizer, module)
            found.append(_held(module, optimizer))
        else:
            found.append(None)
    return found


def note_resumed(checkpoint: dict[str, Any], names: list[Names | None] | None, module: LightningModule) -> None:
    """To be called when a checkpoint is loaded: has its optimizer states compared with the optimizers, by name.

    Args:
        checkpoint: the checkpoint.
        names: as `number_by_module` gave them.
        module: the module that goes on.

    Raises:
        ValueError: if there are states without names, or another number of them, or if a strategy that loads
            optimizers before this has loaded states of other parameters.
    """
    trainer = module._trainer
    if trainer is None or trainer.state.fn != "fit":
        return
    states = checkpoint.get(_STATES)
    if states is not None and (not isinstance(states, list) or names is None or len(states) != len(names)):
        raise ValueError(
            "the checkpoint's record does not name the parameters of each of its optimizer states, so nobody knows "
            "whose they are; load the weights alone and begin a new run"
        )
    if names is None:
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
        ValueError: if an optimizer holds other parameters than the one that was saved, or has them in other groups, or
            if what is named is not what the states hold.
    """
    checkpoint, names = module.__dict__.pop(_RESUMED, ({}, []))
    if _STATES not in checkpoint or module.trainer.ckpt_path is None:  # it was loaded for something else
        return
    own = _compare(names, module)
    for state, saved, mine, optimizer in zip(checkpoint[_STATES], names, own, module.trainer.optimizers, strict=True):
        if _is_torchs(state, optimizer) != (saved is not None):
            raise ValueError(
                f"the state of {type(optimizer).__name__} in the checkpoint does not fit the parameters that are named "
                "beside it: it was changed, or saved by another optimizer; load the weights alone and begin a new run"
            )
        for group, before, now in zip(state["param_groups"], saved, mine, strict=True) if saved is not None else ():
            numbers = dict(zip(before, group["params"], strict=True))
            group["params"] = [numbers[name] for name in now]


def _forget_what_was_not_saved(checkpoint: dict[str, Any], names: list[Names | None], module: LightningModule) -> None:
    """Takes back the states that loading has made for parameters without one, such as those not unfrozen yet.

    They would be a step old when their first one comes.
    """
    parameters = dict(module.named_parameters())
    saved = zip(checkpoint.get(_STATES, ()), names, module.trainer.optimizers, strict=False)
    for state, groups, optimizer in saved:
        if groups is None:
            continue
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        for number, name in zip(numbers, chain.from_iterable(groups), strict=True):
            if not state["state"].get(number):
                optimizer.state.pop(parameters[name], None)


def _compare(names: list[Names | None], module: LightningModule) -> list[Names]:
    """What the module's optimizers hold, if that is what is named."""
    optimizers = module.trainer.optimizers
    if len(optimizers) != len(names):
        raise ValueError(f"the checkpoint has {len(names)} optimizers, and this module {len(optimizers)}")
    mine = [_held(module, optimizer) for optimizer in optimizers]
    for saved, own in zip(names, mine, strict=True):
        if saved is not None:
            _refuse_other_parameters(saved, own)
    return mine


def _held(module: LightningModule, optimizer: Optimizer) -> Names:
    names = {id(p): n for n, p in module.named_parameters()}
    loose = dict.fromkeys(id(p) for p in _parameters(optimizer) if id(p) not in names)
    names |= {i: f"?{number}" for number, i in enumerate(loose)}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


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


def _is_torchs(state: Any, optimizer: Optimizer) -> bool:
    """Whether an optimizer's state is laid out as PyTorch's are: states by number, and groups of such numbers."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    return [len(group["params"]) for group in groups] == [len(group["params"]) for group in optimizer.param_groups]


def _renumbered(state: dict[str, Any], optimizer: Optimizer, module: LightningModule) -> dict[str, Any]:
    places = {id(p): i for i, p in enumerate(module.parameters())}
    for parameter in _parameters(optimizer):  # those of no module come after its own
        places.setdefault(id(parameter), len(places))
    before = chain.from_iterable(group["params"] for group in state["param_groups"])
    numbers = dict(zip(before, (places[id(p)] for p in _parameters(optimizer)), strict=True))
    # a parameter without a state has an empty one: who takes numbers for names looks at the first
    states = {now: state["state"].get(was, {}) for was, now in numbers.items()}
    for key in state["state"].keys() - numbers.keys():  # what is kept for all of them, under a word of the optimizer's
        states.setdefault(key, state["state"][key])
    groups = [{**g, "params": [numbers[i] for i in g["params"]]} for g in state["param_groups"]]
    return {**state, "state": states, "param_groups": groups}


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    return [f"{what}: {', '.join(found[:4])}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")]
