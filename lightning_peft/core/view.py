"""A module seen with other tensors: nothing is written into the module itself, so threads may share it."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.nn import Module

M = TypeVar("M", bound=Module)


def with_tensors(module: M, tensors: dict[str, Tensor]) -> M:
    """A shallow twin of a module in which some parameters are replaced.

    Unlike ``torch.func.functional_call`` it does not exchange entries of the module for the length of a call,
    which a second thread would see.

    Args:
        module: the module; it is left as it is.
        tensors: dotted parameter names below the module, and what stands there in the twin.

    Returns:
        The twin. Its other parameters, buffers and children are the module's own.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    twin.__dict__["_parameters"] = {**module._parameters, **own}
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if "." in name:
            child, _, rest = name.partition(".")
            below.setdefault(child, {})[rest] = tensor
    children = dict(module._modules)
    for child, inner in below.items():
        kept = children[child]
        assert kept is not None
        children[child] = with_tensors(kept, inner)
    twin.__dict__["_modules"] = children
    return twin
