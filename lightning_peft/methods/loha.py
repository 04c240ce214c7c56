"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al., FedPara, arXiv 2108.06098, 2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import LinearMethod, above_rank
from lightning_peft.methods.lycoris import LycorisLayer, is_linear_or_conv, matrix_shape


@dataclass(kw_only=True)
class LoHa(LinearMethod):
    """``W x + s ((A1 B1) * (A2 B2)) x``: a change of rank up to ``r * r`` for the parameters of two rank-r ones.

    ``A: (out, r)``, ``B: (r, in)``, ``s = alpha / r``; ``B2`` starts at zero. A convolution's weight is seen as a
    matrix ``(out, in * kernel)``.

    Args:
        r: rank of each factor, from 1 to the smaller side of any weight; their product has up to its square.
        alpha: strength of the change.
        rank_dropout: share of the change's rows that are left out in training, the rest scaled up.
        module_dropout: how often a module goes without its change in training.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; the product of four small factors wants larger steps than LoRA's.

    Raises:
        ValueError: if a number is out of its range.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    learning_rate: float = 5e-3

    peft_type: ClassVar[str | None] = "LOHA"
    kinds: ClassVar[str] = "Linear, Conv1D, Conv1d or Conv2d"
    peft_idle: ClassVar[tuple[str, ...]] = ("init_weights", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "LoHa",
            range_problems(
                self, counts=["r"], positive=["alpha", "learning_rate"], shares=["rank_dropout", "module_dropout"]
            ),
        )

    def suits(self, module: Module) -> bool:
        """Linear, Conv1D, Conv1d and Conv2d."""
        return is_linear_or_conv(module)

    def beyond(self, name: str, module: Module) -> str | None:
        """A rank above the weight's."""
        return above_rank("r", self.r, min(matrix_shape(module)), name)

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _LohaLayer(module, self)


class _LohaLayer(LycorisLayer):
    def __init__(self, module: Module, method: LoHa) -> None:
        super().__init__(module, method.alpha / method.r, method.rank_dropout, method.module_dropout)
        n_out, n_in = matrix_shape(module)
        device = device_for(module)
        shapes = {"w1_a": (n_out, method.r), "w1_b": (method.r, n_in)}
        for name, shape in {**shapes, "w2_a": shapes["w1_a"], "w2_b": shapes["w1_b"]}.items():
            parameter = Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
            self.register_parameter(f"hada_{name}", parameter)
            if name != "w2_b":
                init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def matrix(self) -> Tensor:
        one = self.get_parameter("hada_w1_a") @ self.get_parameter("hada_w1_b")
        return one * (self.get_parameter("hada_w2_a") @ self.get_parameter("hada_w2_b"))
