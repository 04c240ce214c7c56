"""(IA)^3: keys, values and the feed-forward's inside, rescaled (Liu et al., arXiv 2205.05638, 3.3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of, match_modules, matches
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import LinearMethod, is_linear, oriented, sizes

# the names that transformers' models give to these projections
_KEYS_VALUES = ["k_proj", "v_proj", "key", "value", "k", "v", "c_attn", "query_key_value", "qkv_proj", "k_lin", "v_lin"]
_FEED_FORWARD = ["down_proj", "fc2", "output.dense", "mlp.c_proj", "wo", "dense_4h_to_h", "lin2", "fc_out"]


@dataclass(kw_only=True)
class IA3(LinearMethod):
    """Scales what attention reads and what the feed-forward passes on: ``l * (W x + b)``, or ``W (l * x) + b``.

    ``l`` starts at one and has one entry an output feature, ``(out, 1)``; in feed-forward modules, whose input is
    the activation inside the block, one an input feature, ``(1, in)``.

    Args:
        target_modules: names, suffixes or a regular expression; None takes the projections of keys and values
            and the second layer of the feed-forward under the names that transformers' models give them; in BERT and
            its kin, as in Hugging Face PEFT, attention's output layer is among them by its name, scaled at its input.
        feedforward_modules: which of the targets are scaled at their input, in the same forms; None takes those
            with a feed-forward's name.
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; so few parameters, all near one, want large steps.

    Raises:
        ValueError: if the learning rate is not above 0.
    """

    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    learning_rate: float = 2e-2

    peft_type: ClassVar[str | None] = "IA3"
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_ia3_weights", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems("IA3", range_problems(self, positive=["learning_rate"]))

    def targets(self, model: Module) -> list[str] | str:
        """The targets as given, or those of the known names that the model has.

        Raises:
            ValueError: if the model has none of them.
        """
        if self.target_modules is not None:
            return self.target_modules
        linear = [n for n, m in base_modules(model).items() if is_linear(m)]
        there = [p for p in (*_KEYS_VALUES, *_FEED_FORWARD) if any(matches(n, p) for n in linear)]
        if not there:
            raise ValueError(
                f"IA3 does not know the projections of {class_of(model).__name__}; name them in target_modules, and "
                "those that are scaled at their input in feedforward_modules"
            )
        # a name such as "key" may belong to something else too; only linear modules are meant here
        return sorted(n for n in linear if any(matches(n, p) for p in there))

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _Scale(module, at_input=self._is_feed_forward(name))

    def _is_feed_forward(self, name: str) -> bool:
        given = _FEED_FORWARD if self.feedforward_modules is None else self.feedforward_modules
        if isinstance(given, str):
            return re.fullmatch(given, name) is not None
        return any(matches(name, p) for p in given)

    def arrange(self, model: Module, layers: dict[str, AdapterLayer]) -> Any:
        """The layers, once it is sure that each named feed-forward module is one of the targets.

        Raises:
            ValueError: if one is not.
        """
        if self.feedforward_modules:
            match_modules(model, self.feedforward_modules, option="feedforward_modules")
            given = self.feedforward_modules
            named = [f"{p!r} in feedforward_modules" for p in given if not any(matches(n, p) for n in layers)]
            if isinstance(given, str):
                named = [] if any(map(self._is_feed_forward, layers)) else [f"feedforward_modules={given!r}"]
            if named:
                raise ValueError(f"IA3: {named[0]} names none of the target modules, such as {next(iter(layers))!r}")
        return super().arrange(model, layers)

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; feed-forward modules too are written as resolved names."""
        scaled_at_input = sorted(n for n in placed if self._is_feed_forward(n))
        return {**super().peft_config(model, placed), "feedforward_modules": scaled_at_input}


class _Scale(AdapterLayer):
    """``l * base(x)`` or ``base(l * x)``; x: ``(..., in)`` -> ``(..., out)``."""

    def __init__(self, module: Module, *, at_input: bool) -> None:
        super().__init__()
        n_in, n_out = sizes(module)
        shape = (1, n_in) if at_input else (n_out, 1)
        self.ia3_l = Parameter(torch.ones(shape, dtype=torch.float32, device=device_for(module)))
        self.at_input = at_input

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        if self.at_input:
            scaled: Tensor = base(x * self.ia3_l.flatten().to(x.dtype))
            return scaled
        y: Tensor = base(x)
        return y * self.ia3_l.flatten().to(y.dtype)

    def deltas(self, module: Any) -> dict[str, Tensor]:
        factor = self.ia3_l - 1
        changed = {"weight": module.weight.float() * oriented(factor, module)}
        if module.bias is not None and not self.at_input:
            changed["bias"] = module.bias.float() * factor.flatten()
        return changed
