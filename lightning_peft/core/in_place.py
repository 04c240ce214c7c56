"""The base's own tensors: which there are, and what becomes of those that train in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module, MultiheadAttention

from lightning_peft.core.adapted import Site, attach, detach, site_of
from lightning_peft.core.adapters import Adapters
from lightning_peft.core.matching import base_modules
from lightning_peft.core.routing import Switch
from lightning_peft.core.tree import AdapterTree


def base_parameters(model: Module) -> dict[str, torch.nn.Parameter]:
    """The base's parameters by name, adapters left out; one that has several names by the first.

    Args:
        model: the root, adapted or not.
    """
    return own_parameters(base_modules(model))


def own_parameters(modules: dict[str, Module]) -> dict[str, torch.nn.Parameter]:
    """The parameters of these modules by name, one that has several names by the first.

    Args:
        modules: by name, as `base_modules` gives them.
    """
    return _own(modules, "_parameters")


def base_tensors(model: Module) -> dict[str, torch.Tensor]:
    """The base's parameters and buffers by name, adapters left out.

    Args:
        model: the root of an adapted model.
    """
    modules = base_modules(model)
    return {**_own(modules, "_parameters"), **_own(modules, "_buffers")}


def _own(modules: dict[str, Module], kind: str) -> dict[str, Any]:
    """What PyTorch would name, without a walk through the adapters, which have as many modules as the base."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for owner, module in modules.items():
        for key, tensor in module.__dict__[kind].items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{owner}.{key}" if owner else key] = tensor
    return found


def kept_originals(tree: AdapterTree, call: str) -> dict[str, torch.Tensor]:
    """The starting values of what an adapter trains in place.

    Args:
        tree: the adapter.
        call: what asks for them, for the error.

    Raises:
        RuntimeError: if the method was told to keep none.
    """
    if tree.record.originals is None:
        raise RuntimeError(
            f"{call}: {type(tree.record.method).__name__} trains the base in place and was told not to keep the "
            "originals (keep_originals=False), so the base cannot be given back; load it anew, or adapt with "
            "keep_originals=True"
        )
    return tree.record.originals


def set_in_place(modules: dict[str, Module], adapters: Adapters, names: set[str]) -> None:
    """Tells each of the base's modules which of its parameters train in place: they become float32 and stay it."""
    owners = _owners(modules, names) if names else {}
    for owner, module in modules.items():
        site = site_of(module)
        if owner in owners:
            site = attach(module, adapters.switch)
            site.base.in_place = tuple(owners[owner])
            _make_float32(module, site)
        elif site is not None:
            site.base.in_place = ()
            site.base.cast_to = None
        if site is not None and site.idle:
            detach(module)


def _owners(modules: dict[str, Module], names: set[str]) -> dict[str, list[str]]:
    """The parameters by the module that runs with them, under every name that they have."""
    owners: dict[str, list[str]] = {}
    trained = {id(p) for n, p in own_parameters(modules).items() if n in names}
    attention = {n for n, m in modules.items() if isinstance(m, MultiheadAttention)}
    for owner, module in modules.items():
        for key, parameter in module._parameters.items():
            if id(parameter) in trained:
                parent = owner.rpartition(".")[0]
                inside = parent in attention and owner != parent
                place, key_there = (parent, f"{owner.rpartition('.')[2]}.{key}") if inside else (owner, key)
                owners.setdefault(place, []).append(key_there)
    return owners


def keep_float32(model: Module, outside: Module) -> None:
    """Makes what trains outside an adapted submodule float32 too, whatever the model is cast to later.

    Args:
        model: the whole model.
        outside: the adapted submodule, which has seen to its own parameters.
    """
    inside = {id(m) for m in outside.modules()}
    for module in list(model.modules()):
        names = tuple(n for n, p in module._parameters.items() if p is not None and p.requires_grad)
        if names and id(module) not in inside:
            site = attach(module, Switch())
            site.base.in_place = names
            _make_float32(module, site)


def _make_float32(module: Module, site: Site) -> None:
    for key in site.base.in_place:
        parameter = module.get_parameter(key)
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            site.base.cast_to = parameter.dtype
            parameter.data = parameter.data.float()
