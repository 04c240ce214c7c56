"""Selective fine-tuning: a chosen part of the base's own parameters trains, the rest is frozen.

Sources: biases only, BitFit (Ben Zaken et al., arXiv 2106.10199); norms (arXiv 2302.08106 for language models);
the last layers (Lee et al., arXiv 2210.11466); embeddings, the head alone and full fine-tuning as in common use; layers
that join one after another, from the last to the first (Howard and Ruder, arXiv 1801.06146, 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import Embedding, GroupNorm, LayerNorm, Module, RMSNorm
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.core.matching import (
    base_modules,
    class_of,
    is_within,
    layer_number,
    match_modules,
    output_heads,
)
from lightning_peft.core.method import Placement
from lightning_peft.core.new_heads import new_parameters
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.tree import AdapterTree

_KINDS = ("bias", "norm", "embedding", "head", "weight")
_FULL, _SOME_LAYERS = 2e-4, 5e-4  # rates for whole matrices
_RATES = {"head": 2e-2, "bias": 5e-3, "norm": 5e-3, "embedding": 6e-3}  # larger where a step moves few numbers


@dataclass
class Selective:
    """Trains the base parameters that meet every given condition; new heads train in any case.

    Args:
        target_modules: parameters in these modules and below them; a list of exact names or dotted suffixes, or
            a regular expression for the whole name of a module. None takes any.
        layers_to_transform: parameters in layers of these numbers. None takes any.
        last_layers: parameters in the last so many layers of each stack, 1 or more. None takes any.
        parameter_types: parameters of one of these kinds: ``"bias"``, ``"norm"``, ``"embedding"``, ``"head"``
            (the output head), ``"weight"`` (all others). None takes any.
        unfreeze_until: share of the training's steps after which everything chosen trains. The last layer trains
            from the start, the one before it joins next, and so on down to the embeddings, at even distances; what
            has not joined gets no update. None trains all from the start.
        keep_originals: keep the starting values, so that ``disabled()`` and ``remove()`` give back the base. It
            costs a second copy of what trains.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW. None takes what suits ``parameter_types``: 2e-2 for the head, 5e-3 for biases and
            norms, 6e-3 for embeddings; 5e-4 for whole layers of certain numbers, 2e-4 for all; of several the smallest.
            It is fixed here, whatever the options become later.

    Raises:
        ValueError: if a kind of parameter is unknown or a number is out of its range.
    """

    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    last_layers: int | None = None
    parameter_types: list[str] | None = None
    unfreeze_until: float | None = None
    keep_originals: bool = True
    modules_to_save: list[str] | None = None
    learning_rate: float = None  # type: ignore[assignment]  # a number once it is made

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = True
    total_step: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        given = self.learning_rate
        self.learning_rate = _FULL if given is None else given
        check_types(self)
        if given is None:
            self.learning_rate = self._own_rate()
        both = self.layers_to_transform is not None and self.last_layers is not None
        raise_problems(
            "Selective",
            [
                *range_problems(self, counts=["last_layers"], positive=["learning_rate"]),
                *(
                    f"parameter_types has {kind!r}{nearest(kind, _KINDS)}"
                    for kind in self.parameter_types or []
                    if kind not in _KINDS
                ),
                "layers_to_transform and last_layers exclude each other" if both else None,
                "layers_to_transform is empty; name at least one layer, or leave it out to take all"
                if self.layers_to_transform == []
                else None,
                f"unfreeze_until must be above 0 and at most 1, but got {self.unfreeze_until}"
                if self.unfreeze_until is not None and not 0 < self.unfreeze_until <= 1
                else None,
            ],
        )

    def _own_rate(self) -> float:
        matrices = _FULL if self.last_layers is None and self.layers_to_transform is None else _SOME_LAYERS
        return min(_RATES.get(kind, matrices) for kind in self.parameter_types or ["weight"])

    def place(self, model: Module) -> Placement:
        """The names of the parameters that train in place; no module gets a layer.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if no parameter meets all conditions.
        """
        names = _trainable_names(model)
        if self.target_modules is not None:
            places = match_modules(model, self.target_modules)
            names = [n for n in names if is_within(n, places)]
        if self.layers_to_transform is not None or self.last_layers is not None:
            names = self._in_layers(names)
        if self.parameter_types is not None:
            kinds = _kinds(model)
            wanted = set(self.parameter_types)
            names = [n for n in names if kinds[n] & wanted]
        new = set(new_parameters(base_modules(model)))
        if not names and not new:
            raise ValueError(
                f"Selective: no parameter of {class_of(model).__name__} meets {self._conditions()}; "
                "list named_parameters() of the model and name its modules in target_modules"
            )
        return Placement(in_place=[n for n in names if n not in new], keep_originals=self.keep_originals)

    @property
    def scheduled(self) -> bool:
        """Whether layers join one after another."""
        return self.unfreeze_until is not None

    def check_schedule(self, total: int) -> None:
        """Any number of steps will do."""

    def before_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """Takes away the gradients of what is not to train yet: an optimizer leaves parameters without one alone."""
        assert self.unfreeze_until is not None
        groups = _from_the_top(model, tree.record.in_place)
        between = self.unfreeze_until * total / max(1, len(groups) - 1)
        for number, group in enumerate(groups):
            if step - 1 < number * between:
                for name in group:
                    model.get_parameter(name).grad = None

    def after_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """Nothing: the gradients decide."""

    def _in_layers(self, names: Sequence[str]) -> list[str]:
        numbers = {n: number for n in names if (number := layer_number(n)) is not None}
        counts: dict[str, int] = {}
        for stack, i in numbers.values():
            counts[stack] = max(counts.get(stack, 0), i + 1)
        if self.last_layers is not None:
            if not counts:
                raise ValueError("Selective: last_layers finds no numbered stack of layers; use target_modules")
            if self.last_layers > max(counts.values()):
                raise ValueError(f"Selective: last_layers={self.last_layers}, but the model has {max(counts.values())}")
            last = self.last_layers
            return [n for n, (stack, i) in numbers.items() if i >= counts[stack] - last]
        layers = self.layers_to_transform
        wanted = [layers] if isinstance(layers, int) else list(layers or [])
        lost = [i for i in wanted if all(i != number[1] for number in numbers.values())]
        if lost:
            there = sorted({number[1] for number in numbers.values()})
            raise ValueError(f"Selective: layers_to_transform={lost} matches no layer; there are {there}")
        return [n for n, (_, i) in numbers.items() if i in wanted]

    def _conditions(self) -> str:
        fields = ("target_modules", "layers_to_transform", "last_layers", "parameter_types")
        given = {f: getattr(self, f) for f in fields if getattr(self, f) is not None}
        return ", ".join(f"{k}={v!r}" for k, v in given.items()) or "no condition"


def _from_the_top(model: Module, names: Sequence[str]) -> list[list[str]]:
    """Parameters in groups, the last layers' first; what stands before or after a stack of layers is below or above it.

    Args:
        model: the root.
        names: the parameters.
    """
    order = [n for n, _ in model.named_parameters()]
    numbers = {n: number for n in order if (number := layer_number(n)) is not None}
    deepest: dict[str, int] = {}
    for stack, i in numbers.values():
        deepest[stack] = max(deepest.get(stack, 0), i)
    groups: dict[int, list[str]] = {}
    height = -1  # of what comes before the first layer
    for name in order:
        if name in numbers:
            stack, i = numbers[name]
            # of several stacks, such as an encoder's and a decoder's, the last layers stand side by side
            height = i - deepest[stack] + max(deepest.values())
        elif height >= 0:
            height = max(deepest.values())
        if name in names:
            groups.setdefault(height, []).append(name)
    return [groups[h] for h in sorted(groups, reverse=True)]


def _is_norm(module: Module) -> bool:
    known = (LayerNorm, GroupNorm, RMSNorm, _NormBase)
    # transformers defines an RMSNorm of its own for each model, with no common class
    return isinstance(module, known) or class_of(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _kinds(model: Module) -> dict[str, set[str]]:
    """The kinds of each parameter: a norm's bias is both of ``norm`` and of ``bias``."""
    heads = output_heads(model)
    found: dict[str, set[str]] = {}
    for place, module in base_modules(model).items():
        for key in module._parameters:
            name = f"{place}.{key}" if place else key
            tests = {
                "bias": key.endswith("bias"),
                "norm": _is_norm(module),
                "embedding": isinstance(module, Embedding),
                "head": is_within(name, heads),
            }
            found[name] = {kind for kind, holds in tests.items() if holds} or {"weight"}
    return found


def _trainable_names(model: Module) -> list[str]:
    """Floating-point base parameters by name, tied ones once."""
    owned = {id(p) for m in base_modules(model).values() for p in m._parameters.values() if p is not None}
    named = model.named_parameters()
    return [n for n, p in named if id(p) in owned and (p.is_floating_point() or is_quantized(p))]
