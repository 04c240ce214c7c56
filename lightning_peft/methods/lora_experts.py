"""LoRA on bare parameters that a module uses by itself: the stacked weights of a mixture's experts, a router's weight.

Each of the E experts of a stack gets a low-rank change of its own, ``W_e + s B_e A_e`` (LoRA, arXiv 2106.09685, 4.1,
an expert at a time). The layout of the factors is Hugging Face PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.base import Base
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, class_of, is_within, matching, unmatched
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.methods.lora_layers import EmbeddingLayer
from lightning_peft.methods.lora_low_rank import LowRank, refuse_rank

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA


class ParameterFactors(LowRank):
    """The factors of one parameter: ``lora_A``: ``(r E, in)``, ``lora_B``: ``(out, r E)``.

    A's rows come an expert after the other, B's columns a rank after the other. A stack is ``(E, out, in)``, or
    ``(E, in, out)`` where its module says ``is_transposed``; a matrix is ``(out, in)`` with E = 1.
    """

    def __init__(self, name: str, module: Module, method: LoRA) -> None:
        parameter = module.get_parameter(name.rpartition(".")[2])
        shape = tuple(parameter.shape)
        raise_problems(
            f"LoRA on the parameter {name!r}",
            [
                None if len(shape) in (2, 3) else f"expected a matrix or a stack of matrices, but it is {shape}",
                None
                if parameter.is_floating_point()
                else f"expected floating-point values, but it is {parameter.dtype}",
                *(f"{option} has no meaning for a bare parameter" for option in _beyond(method)),
            ],
        )
        self.stack = shape[:-2]
        self.transposed = bool(self.stack) and bool(getattr(module, "is_transposed", False))
        n_in, n_out = shape[-2:] if self.transposed else (shape[-1], shape[-2])
        super().__init__(name, module, method, (n_in,), (n_out,), copies=self.stack[0] if self.stack else 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two tensors whose product, times the scale, is the change, in the way in which the parameter is stored."""
        if not self.stack:
            return self.lora_B, self.lora_A
        experts = self.stack[0]
        a = self.lora_A.reshape(experts, -1, self.lora_A.shape[1])
        b = self.lora_B.reshape(len(self.lora_B), -1, experts).permute(2, 0, 1)
        return (a.mT, b.mT) if self.transposed else (b, a)

    def added_to(self, weight: Tensor) -> Tensor:
        """``W + s B A`` in the weight's dtype, in one operation: a stack of experts is large."""
        left, right = (f.to(weight.dtype) for f in self.factors())
        add = torch.baddbmm if self.stack else torch.addmm
        # autocast would give the sum another dtype than the module's other parameters have
        with torch.autocast(weight.device.type, enabled=False):
            return add(weight, left, right, alpha=self.scale)


class ParametersLayer(AdapterLayer):
    """Runs a module's own forward with ``W + s B A`` in place of the chosen parameters of the module.

    Args:
        names: the parameters' full names.
        module: the module that owns them.
        method: the options.
    """

    def __init__(self, names: Sequence[str], module: Module, method: LoRA) -> None:
        super().__init__()
        self.keys = tuple(n.rpartition(".")[2] for n in names)
        for key, name in zip(self.keys, names, strict=True):
            # as it is: add_module refuses names that a Module has as attributes
            self._modules[key] = ParameterFactors(name, module, method)

    def factors_of(self, key: str) -> ParameterFactors:
        """The factors of one of the module's parameters."""
        found = self._modules[key]
        assert isinstance(found, ParameterFactors)
        return found

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the module; the changes of other active adapters of this kind are added to the same weights."""
        layers, call = [self], base
        while not isinstance(call, Base):
            inner = getattr(call, "func", None)
            if not isinstance(inner, ParametersLayer):
                break
            layers.insert(0, inner)
            call = call.args[0]  # type: ignore[attr-defined]  # a functools.partial around the next inner layer
        if not isinstance(call, Base) or call.instance_forward is not None:
            raise RuntimeError(
                "LoRA on target_parameters runs the module with changed weights, so no layer of another kind may "
                "lie below it and the module must have no forward of its own; deactivate the other adapter"
            )
        changed = call.casts()
        for layer in layers:
            for key in layer.keys:
                weight = changed[key] if key in changed else call.module.get_parameter(key)
                changed[key] = layer.factors_of(key).added_to(weight)
        return call.cls.forward(call.view(changed), *args, **kwargs)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of each parameter."""
        pairs = {key: self.factors_of(key) for key in self.keys}
        return {key: torch.matmul(*pair.factors()) * pair.scale for key, pair in pairs.items()}

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of each parameter."""
        pairs = {key: (self.factors_of(key).factors(), self.factors_of(key).scale) for key in self.keys}
        return {key: (right, left * scale) for key, ((left, right), scale) in pairs.items()}


def parameter_names(model: Module, patterns: Sequence[str] | None, targets: Sequence[str] = ()) -> list[str]:
    """The parameters that ``target_parameters`` means, in the model's order.

    Args:
        model: the root.
        patterns: exact names or dotted suffixes.
        targets: modules that get a layer of their own; none of them may own such a parameter.

    Raises:
        ValueError: if a pattern matches no parameter, or one of the root itself or of a target module.
    """
    if not patterns:
        return []
    owned = {
        f"{n}.{k}" if n else k: n
        for n, m in base_modules(model).items()
        for k, p in m._parameters.items()
        if p is not None
    }
    lost = unmatched(patterns, owned)
    if lost:
        raise ValueError(f"target_parameters: {lost[0]!r} matches no parameter{nearest(lost[0], owned)}")
    names = matching(patterns, owned)
    for name in names:
        if not owned[name]:
            raise ValueError(
                f"target_parameters: {name!r} belongs to {class_of(model).__name__} itself, for which files have no "
                "name; adapt a module that contains this one"
            )
        if is_within(owned[name], targets):
            raise ValueError(
                f"target_parameters: {name!r} belongs to {owned[name]!r}, which target_modules names too; name it in "
                "one of them (target_modules=[] leaves all modules out)"
            )
    return names


def parameter_layers(model: Module, names: Sequence[str], method: LoRA) -> dict[str, AdapterLayer]:
    """A layer for each module that owns some of the parameters."""
    owners = dict.fromkeys(owner_of(n) for n in names)
    return {
        owner: ParametersLayer([n for n in names if owner_of(n) == owner], model.get_submodule(owner), method)
        for owner in owners
    }


def refuse_ranks(layers: dict[str, AdapterLayer], rank: Callable[[str], int]) -> None:
    """Refuses a rank above the smaller side of the weight, which adds numbers and no change.

    Args:
        layers: LoRA's, by module.
        rank: the rank for the module or the parameter of a name.

    Raises:
        ValueError: if there is one; it names the first such module or parameter.
    """
    for place, layer in layers.items():
        for inside, part in layer.named_modules() if layer._modules else [("", layer)]:
            if not isinstance(part, (LowRank, EmbeddingLayer)):
                continue
            single = isinstance(part, ParameterFactors)
            name = f"{place}.{inside}" if single else place
            refuse_rank(name, rank(name), part.limit, parameter=single)


def owner_of(name: str) -> str:
    """The module that a parameter belongs to, by name."""
    return name.rpartition(".")[0]


def peft_place(model: Module, name: str, patterns: Sequence[str]) -> str:
    """Where a PEFT file has the factors of a parameter.

    There each parameter wraps its module once more, the first one innermost, and a key says by its number of
    ``base_layer`` which wrapper is meant.

    Args:
        model: the root.
        name: the parameter's full name.
        patterns: ``target_parameters``.
    """
    beside = [n for n in parameter_names(model, patterns) if owner_of(n) == owner_of(name)]
    return owner_of(name) + ".base_layer" * (len(beside) - 1 - beside.index(name))


def _beyond(method: LoRA) -> list[str]:
    given = {
        "use_dora=True": method.use_dora,
        "lora_bias=True": method.lora_bias,
        "lora_fa=True": method.lora_fa,
        f"lora_dropout={method.lora_dropout}": method.lora_dropout,
        f"init_lora_weights={method.init_lora_weights!r}": method.starts_apart
        or method.needs_data
        or method.needs_codes,
    }
    return [option for option, value in given.items() if value]
