"""A model's structure apart from the model: other module objects over the same weights."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapted import instance_forward_of
from lightning_peft.core.adapters import Adapters
from lightning_peft.core.generated import SITE
from lightning_peft.core.matching import class_of


def bare_twin(model: Module) -> Module:
    """The base as it was before any adapter, in module objects of its own: what is put into them the model lacks.

    Its weights are the model's own memory under other `Parameter` objects, so flags and replaced data stay in the
    twin. Modules and parameters that the model shares are shared in the twin too.

    Args:
        model: the root of an adapted model, or any module; it is left as it is.

    Returns:
        The twin.
    """
    modules: dict[int, Module] = {}
    parameters: dict[int, Tensor] = {}

    def other(parameter: Tensor) -> Tensor:
        # a quantized weight's class holds what its data mean; such a one stays itself
        if type(parameter) is not Parameter:
            return parameter
        if id(parameter) not in parameters:
            parameters[id(parameter)] = Parameter(parameter.detach(), parameter.requires_grad)
        return parameters[id(parameter)]

    def twin_of(module: Module) -> Module:
        if id(module) in modules:
            return modules[id(module)]
        twin = object.__new__(class_of(module))
        modules[id(module)] = twin
        # hooks are kept in dictionaries, and whatever is hooked into the twin must not reach the model
        twin.__dict__ |= {k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        twin.__dict__.pop(SITE, None)
        forward = instance_forward_of(module)
        if forward is not None:
            twin.__dict__["forward"] = forward
        twin._parameters = {n: None if p is None else other(p) for n, p in module._parameters.items()}  # type: ignore[misc]
        children = {n: c for n, c in module._modules.items() if not isinstance(c, Adapters)}
        twin._modules = {n: None if c is None else twin_of(c) for n, c in children.items()}
        return twin

    return twin_of(model)
