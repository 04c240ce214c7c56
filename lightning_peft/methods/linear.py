"""What the methods share that put a layer beside chosen linear modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.base import Base
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import ALL_LINEAR, base_modules, class_of, is_conv1d, is_within, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.new_heads import new_modules, new_parameters
from lightning_peft.core.problems import an, raise_problems, refuse_unknown
from lightning_peft.core.quantized import dequantized, is_quantized, numbers
from lightning_peft.core.view import with_tensors

# options that say where the layers go and how they train, which a PEFT file gives in its own way
_OURS = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "learning_rate")


@dataclass(kw_only=True)
class LinearMethod:
    """A method whose layers stand beside single linear modules; a subclass makes the layers and adds its options.

    Args:
        target_modules: a list of exact names or dotted suffixes, a regular expression for the whole name, or
            ``"all-linear"`` for every linear layer but the output head. Which one is the head only transformers' models
            say: in another net a small head is for ``exclude_modules``.
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Attributes:
        kinds: the modules that the method works on, for errors.
        peft_idle: fields of Hugging Face's configuration that say nothing here.
    """

    target_modules: list[str] | str | None = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-3

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = True
    kinds: ClassVar[str] = "Linear or Conv1D"
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_weights", "runtime_config")

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one matched module.

        Raises:
            ValueError: if an option does not fit the module.
        """
        raise NotImplementedError(f"{type(self).__name__} must define layer(name, module)")

    def suits(self, module: Module) -> bool:
        """Whether the method works on a module of this kind."""
        return is_linear(module)

    def targets(self, model: Module) -> list[str] | str:
        """The patterns to match: those given, unless a method knows better ones for the model."""
        return ALL_LINEAR if self.target_modules is None else self.target_modules

    def place(self, model: Module) -> Placement:
        """A layer for each matched module.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if nothing matches, or a matched module does not suit.
        """
        names = target_names(model, self, self.targets(model), self.suits, self.kinds)
        modules = base_modules(model)
        # all-linear also names attention modules of torch, which only some methods have a layer for
        unfit = [n for n in names if not self.suits(modules[n])]
        if unfit:
            what = class_of(modules[unfit[0]]).__name__
            raise ValueError(
                f"{type(self).__name__}: {unfit[0]!r} is {an(what)}; expected {self.kinds}, so exclude it "
                f"(exclude_modules={unfit[:1]!r}) or name other target_modules"
            )
        # all that is named may train in full
        return self.arrange(model, {n: self.layer(n, modules[n]) for n in names}) if names else Placement()

    def beyond(self, name: str, module: Module) -> str | None:
        """What number is beyond what a module has room for, as a sentence; None if none is."""
        return None

    def refuse_beyond(self, model: Module, layers: dict[str, AdapterLayer]) -> None:
        """Refuses a number beyond what one of the modules has room for.

        Raises:
            ValueError: if there is one; it names the first such module.
        """
        found = (self.beyond(n, model.get_submodule(n)) for n in layers if n)
        raise_problems(type(self).__name__, [next((problem for problem in found if problem), None)])

    def arrange(self, model: Module, layers: dict[str, AdapterLayer]) -> Placement:
        """What is placed, given the layers; a method whose layers share something adds it here."""
        return Placement(layers)

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``: the options under their own names, targets as resolved names."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OURS}
        conv1d = [is_conv1d(model.get_submodule(n)) for n in placed if n]
        turned = {"fan_in_fan_out": any(conv1d)} if "fan_in_fan_out" in self.peft_idle else {}
        return {**own, **turned, "target_modules": sorted(n for n in placed if n)}

    def peft_name(self, key: str, model: Module) -> str:
        """The name of a tensor in a PEFT file: its own behind ``base_model.model.``."""
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Self:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        initial = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
        harmless = {k: v for k, v in config.items() if k not in names and v in ("none", initial.get(k))}
        refuse_unknown(cls.__name__, config, known=[*names, *cls.peft_idle, *harmless])
        return cls(**{n: config[n] for n in names if config.get(n) is not None})


class Targeted(Protocol):
    """The options that say where a method's layers go."""

    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    modules_to_save: list[str] | None


def target_names(
    model: Module, method: Targeted, target: list[str] | str, suits: Callable[[Module], bool], kinds: str
) -> list[str]:
    """The modules that a method puts its layers beside.

    Args:
        model: the root.
        method: what is excluded, which layers count, and what trains in full and so needs no layer beside it.
        target: the patterns.
        suits: tells a module that the method can work on.
        kinds: what ``suits`` stands for, for errors.

    Raises:
        ValueError: if a pattern matches nothing, or nothing that suits.
    """
    names = match_modules(
        model, target, exclude=method.exclude_modules, layers=method.layers_to_transform, suits=suits, kinds=kinds
    )
    saved = match_modules(model, method.modules_to_save, option="modules_to_save") if method.modules_to_save else []
    new, _ = new_modules(model, new_parameters(base_modules(model)))
    in_full = {*saved, *new}
    return [n for n in names if not is_within(n, in_full)] if in_full else names


def is_linear(module: Module) -> bool:
    """Whether a module is a Linear or a Conv1D."""
    return isinstance(module, Linear) or is_conv1d(module)


def sizes(module: Any) -> tuple[int, int]:
    """The numbers of input and output features of a Linear or Conv1D."""
    if is_conv1d(module):
        n_in, n_out = module.weight.shape
        return int(n_in), int(n_out)
    return int(module.in_features), int(module.out_features)


def above_rank(option: str, given: int, limit: int, name: str) -> str | None:
    """The sentence about a rank above the smaller side of a weight, which adds numbers and no change; None if it fits.

    Args:
        option: the option that gives the rank.
        given: the rank.
        limit: the smaller side.
        name: the module that has the weight.
    """
    if given <= limit:
        return None
    return (
        f"{option}={given} is above {limit}, the smaller side of the weight of {name!r}; lower it to {limit} or less, "
        f"or exclude the module (exclude_modules=[{name!r}])"
    )


def near_divisors(given: int, number: int) -> str:
    """The end of an error's sentence about a number that does not divide another: the nearest that do.

    Args:
        given: what was given.
        number: what it was to divide.
    """
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    if divisors == [1]:
        return "only 1 does"
    nearest = sorted(divisors, key=lambda d: abs(d - given))[:2]
    return "the nearest that do are " + " and ".join(str(d) for d in sorted(nearest))


def oriented(delta: Tensor, module: Module) -> Tensor:
    """A matrix ``(out, in)`` in the way in which the module stores its weight."""
    return delta.T if is_conv1d(module) else delta


def weight_of(module: Any) -> Tensor:
    """The weight of a Linear or Conv1D as ``(out, in)``, without a gradient; a quantized one's numbers in float32."""
    weight = module.weight
    return oriented(dequantized(module, weight) if is_quantized(weight) else weight.detach(), module)


def module_below(base: Callable[..., Any]) -> Module:
    """The adapted module behind the callable that a layer was given, with the weights that the layers below it make.

    So a layer that reads the weight gives the same over adapters and over merged ones. What cannot be merged counts as
    no change.
    """
    layers: list[AdapterLayer] = []
    while not isinstance(base, Base):
        layers.append(base.func)  # type: ignore[attr-defined]  # the functools.partial of an inner layer
        base = base.args[0]  # type: ignore[attr-defined]
    module = base.module
    for layer in reversed(layers):
        try:
            deltas = layer.deltas(module) or {}
        except ValueError:
            continue
        wide = {n: numbers(module, p) for n, p in module.named_parameters() if n in deltas}
        module = with_tensors(module, {n: p + deltas[n] for n, p in wide.items()})
    return module


def is_readable(module: Any) -> bool:
    """Whether the numbers of a Linear's or Conv1D's weight can be had: not where it is offloaded or packed."""
    if is_quantized(module.weight):
        return True
    weight = weight_of(module)
    # numbers of 8 bits have their scales elsewhere
    wide = weight.is_floating_point() and weight.itemsize > 1
    return wide and not weight.is_meta and weight.shape == sizes(module)[::-1]


class DeltaLayer(AdapterLayer):
    """``base(x) + D x`` on a Linear or Conv1D; a subclass makes ``D: (out, in)`` from its parameters."""

    def delta(self) -> Tensor:
        """The change of the weight, ``(out, in)``."""
        raise NotImplementedError(f"{type(self).__name__} must define delta()")

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module gives, and the change beside it."""
        y: Tensor = base(x)
        return y + self.change(x.to(y.dtype))

    def change(self, x: Tensor) -> Tensor:
        """``D x`` in the dtype of x; ``(..., in)`` -> ``(..., out)``."""
        return F.linear(x, self.delta().to(x.dtype))

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change in the way in which the module stores its weight."""
        return {"weight": oriented(self.delta(), module)}


class SharedTensors(AdapterLayer):
    """Tensors that all layers of one adapter read; they are the root's and saved with the adapter.

    Args:
        tensors: the tensors by name, in float32.
        train: whether they train; else they stay as they are.
    """

    def __init__(self, tensors: dict[str, Tensor], *, train: bool = False) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if train:
                self.register_parameter(name, Parameter(tensor.float()))
            else:
                self.register_buffer(name, tensor.float())

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the root as it is."""
        return base(*args, **kwargs)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """Nothing: the tensors act through the layers."""
        return {}


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator, fan_in: int) -> Tensor:
    """He's uniform distribution from a generator of one's own: the same numbers on every machine.

    Args:
        shape: of the tensor.
        generator: on the CPU.
        fan_in: the number of inputs; the bound is ``sqrt(6 / fan_in)``.
    """
    bound = (6 / fan_in) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
