"""The original forward of an adapted module, and what may be read of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Linear, Module, Parameter

from lightning_peft.core.generated import SITE
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.view import with_tensors

PLAIN = frozenset({Tensor, Parameter, FakeTensor})
"""Kinds of tensors that are whole and as they look; the last one has no numbers, which no operator minds."""


class Base:
    """The original forward of one adapted module, as a callable that knows its module.

    Attributes:
        module: the adapted module.
        cls: its class before adaptation.
        instance_forward: a ``forward`` that lay on the instance (accelerate's hooks put it there), or None.
        in_place: names of its parameters, dotted below it, that train in place and so stay float32.
        cast_to: the dtype that those would have if they did not train, or None if that is float32.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.cls = type(module)
        self.instance_forward: Callable[..., Any] | None = module.__dict__.get("forward")
        self.in_place: tuple[str, ...] = ()
        self.cast_to: torch.dtype | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the original forward."""
        casts = self.casts()
        if casts:
            # Some models cast what they hand to a layer to its weight's dtype (T5), which is float32 here
            return self.cls.forward(self.view(casts), *(self._as_computed(a) for a in args), **kwargs)
        if self.in_place and is_quantized(self.module._parameters.get("weight")):
            return self.cls.forward(self.view(self._beside_codes(args)), *args, **kwargs)
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        return self.cls.forward(self.module, *args, **kwargs)

    def view(self, tensors: dict[str, Tensor]) -> Module:
        """The module before adaptation, with some parameters replaced, for calling its class's forward."""
        twin = with_tensors(self.module, tensors)
        twin.__dict__.pop(SITE)
        twin.__class__ = self.cls
        return twin

    def casts(self) -> dict[str, Tensor]:
        """The parameters that train in place, cast to what the module computes in; empty in float32."""
        if self.cast_to is None:
            return {}
        parameters = {name: self.module.get_parameter(name) for name in self.in_place}
        return {n: p.to(self.cast_to) for n, p in parameters.items() if p.dtype != self.cast_to}

    def _beside_codes(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """What trains beside codes, as the layer computes with it: bitsandbytes' would cast the parameter itself."""
        dtype = next((a.dtype for a in args if isinstance(a, Tensor)), torch.float32)
        wanted: torch.dtype = getattr(self.module, "compute_dtype", None) or dtype
        return {name: self.module.get_parameter(name).to(wanted) for name in self.in_place}

    def _as_computed(self, argument: Any) -> Any:
        """A floating-point input in the dtype that a layer without children computes in."""
        if isinstance(argument, Tensor) and argument.is_floating_point() and not self.module._modules:
            return argument.to(self.cast_to)
        return argument

    def plain_weight(self, x: Tensor) -> Tensor | None:
        """The weight, if a fused operator may read it instead of calling the forward.

        ``torch.nn.functional.linear`` takes a meta or otherwise absent weight without a word and returns
        garbage, so everything that is not a plain local Linear goes through the forward.

        Args:
            x: the module's input.

        Returns:
            The frozen dense weight on the input's device, or None.
        """
        if self.cls is not Linear or self.instance_forward is not None:
            return None
        weight = self.module._parameters.get("weight")
        frozen = is_frozen_here(weight) and "weight" not in self.in_place
        return weight if frozen and weight is not None and weight.device == x.device else None


def is_frozen_here(weight: Tensor | None) -> bool:
    """Whether a weight is a dense one of this process that does not train."""
    if type(weight) not in PLAIN or not isinstance(weight, Parameter):
        return False
    return not weight.requires_grad and weight.layout is torch.strided


def is_watched(module: Module) -> bool:
    """Whether something beside its forward runs when a module is called.

    Args:
        module: any module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


def is_frozen_linear(module: Module) -> bool:
    """Whether a module is a Linear as PyTorch has it, not adapted, watched or replaced, whose parameters rest.

    Args:
        module: any module.
    """
    if type(module) is not Linear or "forward" in module.__dict__ or module._forward_hooks:
        return False
    return is_frozen_here(module.weight) and (module.bias is None or is_frozen_here(module.bias))


def innermost(base: Callable[..., Any]) -> Base:
    """The original forward behind the callable that a layer was given, other adapters' layers in between or not."""
    while not isinstance(base, Base):
        base = base.args[0]  # type: ignore[attr-defined]  # the functools.partial of an inner layer
    return base


def module_of(base: Callable[..., Any]) -> Module:
    """The adapted module behind the callable that a layer was given."""
    return innermost(base).module


def compute_dtype(base: Callable[..., Any]) -> torch.dtype | None:
    """The dtype in which the module behind ``base`` computes: that of its first floating-point parameter.

    Args:
        base: the callable that an adapter layer was given.

    Returns:
        The dtype, or None for a module without floating-point parameters.
    """
    return next((p.dtype for p in module_of(base).parameters() if p.is_floating_point()), None)
