"""LoKr: a change that is a Kronecker product (Yeh et al., LyCORIS, arXiv 2309.14859, 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import LinearMethod, is_linear, sizes
from lightning_peft.methods.lycoris import LycorisLayer, is_linear_or_conv


@dataclass(kw_only=True)
class LoKr(LinearMethod):
    """``W x + s (C kron D) x`` with ``C: (o1, i1)``, ``D: (o2, i2)``, ``o1 o2 = out``, ``i1 i2 = in``.

    A factor whose longer side is above ``2 r`` is itself of rank r (the larger, D; C too with ``decompose_both``);
    ``s = alpha / r``.

    Args:
        r: rank of a decomposed factor; one whose longer side is not above ``2 r`` is taken whole, so that no rank is
            too high.
        alpha: strength of the change.
        rank_dropout: share of the change's rows that are left out in training.
        rank_dropout_scale: whether the rows that stay are scaled up for it.
        module_dropout: how often a module goes without its change in training.
        decompose_both: whether C too may be low-rank.
        decompose_factor: the size wanted for C's sides; -1 takes the most even split of each side.
        init_weights: True starts C at zero, ``"lycoris"`` starts D at zero, as the authors' code does.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    decompose_both: bool = False
    decompose_factor: int = -1
    init_weights: bool | str = True
    learning_rate: float = 5e-3

    peft_type: ClassVar[str | None] = "LOKR"
    kinds: ClassVar[str] = "Linear, Conv1D, Conv1d or Conv2d"
    peft_idle: ClassVar[tuple[str, ...]] = ("runtime_config",)

    def __post_init__(self) -> None:
        check_types(self)
        factor = self.decompose_factor
        raise_problems(
            "LoKr",
            [
                *range_problems(
                    self, counts=["r"], positive=["alpha", "learning_rate"], shares=["rank_dropout", "module_dropout"]
                ),
                f"decompose_factor must be -1, or 1 or more, but got {factor}" if factor != -1 and factor < 1 else None,
                f"init_weights must be True or 'lycoris', but got {self.init_weights!r}"
                if self.init_weights not in (True, "lycoris")
                else None,
            ],
        )

    def suits(self, module: Module) -> bool:
        """Linear, Conv1D, Conv1d and Conv2d."""
        return is_linear_or_conv(module)

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _LokrLayer(module, self)


def split(number: int, factor: int = -1) -> tuple[int, int]:
    """Two whole numbers whose product is the given one, the smaller first.

    Args:
        number: what is split.
        factor: taken as it is if it divides the number; else the smaller part is the largest divisor that is not
            above it. -1 sets no limit, which gives the most even split.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = number if factor == -1 else factor
    smaller = max(d for d in range(1, math.isqrt(number) + 1) if number % d == 0 and (d == 1 or d <= limit))
    return smaller, number // smaller


class _LokrLayer(LycorisLayer):
    def __init__(self, module: Any, method: LoKr) -> None:
        super().__init__(module, method.alpha / method.r, method.rank_dropout, method.module_dropout)
        self.rescaled = method.rank_dropout_scale
        if is_linear(module):
            n_in, n_out = sizes(module)
            kernel = 1
        else:
            n_out, n_in = module.weight.shape[:2]
            kernel = module.weight[0, 0].numel()
        # a convolution's kernel stays with the second factor
        self.kernel_shape = () if is_linear(module) else tuple(module.weight.shape[2:])
        (o1, o2), (i1, i2) = split(n_out, method.decompose_factor), split(n_in, method.decompose_factor)
        device = device_for(module)
        self._factor("lokr_w1", (o1, i1), method.r if method.decompose_both else None, device)
        self._factor("lokr_w2", (o2, i2), method.r, device, kernel)
        zero = "lokr_w1" if method.init_weights is True else "lokr_w2"
        part = "_a" if zero == "lokr_w1" else "_b"
        with torch.no_grad():
            self._parameters[zero if zero in self._parameters else zero + part].zero_()  # type: ignore[union-attr]

    def _factor(self, name: str, shape: tuple[int, int], r: int | None, device: torch.device, kernel: int = 1) -> None:
        rows, columns = shape
        parts: dict[str, tuple[int, ...]]
        if r is not None and r < max(shape) / 2:
            parts = {f"{name}_a": (rows, r), f"{name}_b": (r, columns * kernel)}
        else:
            parts = {name: (rows, columns, *(self.kernel_shape if name == "lokr_w2" else ()))}
        for key, size in parts.items():
            parameter = Parameter(torch.empty(size, dtype=torch.float32, device=device))
            init.kaiming_uniform_(parameter, a=math.sqrt(5))
            self.register_parameter(key, parameter)

    def _whole(self, name: str) -> Tensor:
        whole = self._parameters.get(name)
        return whole if whole is not None else self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    def matrix(self) -> Tensor:
        one, two = self._whole("lokr_w1"), self._whole("lokr_w2")
        # kron puts the kernel's places into the columns, last, as a flattened convolution has them
        return torch.kron(one, two.reshape(len(two), -1))
