"""What LoHa and LoKr share: a change made as one matrix, with dropout on its rows or on the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Module
from torch.nn import functional as F

from lightning_peft.core.base import module_of
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.methods.linear import is_linear, oriented, sizes


def is_linear_or_conv(module: Module) -> bool:
    """Whether a module's weight can be seen as one matrix."""
    return is_linear(module) or isinstance(module, (Conv1d, Conv2d))


def matrix_shape(module: Any) -> tuple[int, int]:
    """The weight as a matrix: ``(out, in)``, of a convolution ``(out, in / groups * kernel)``."""
    if is_linear(module):
        n_in, n_out = sizes(module)
        return n_out, n_in
    return module.weight.shape[0], module.weight[0].numel()


class LycorisLayer(AdapterLayer):
    """``base(x) + s M x``: a subclass makes ``M`` of the shape that `matrix_shape` gives.

    Args:
        module: the adapted module.
        scale: the factor ``s``.
        rank_dropout: share of M's rows left out in training.
        module_dropout: how often the change is left out as a whole in training.
    """

    def __init__(self, module: Module, scale: float, rank_dropout: float, module_dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.rescaled = True

    def matrix(self) -> Tensor:
        """The change before its scale."""
        raise NotImplementedError(f"{type(self).__name__} must define matrix()")

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module gives, and the change beside it; x: ``(..., in)`` or a convolution's input."""
        y: Tensor = base(x)
        if self.training and self.module_dropout and torch.rand(1) <= self.module_dropout:
            return y
        module: Any = module_of(base)
        matrix = self.matrix() * self.scale
        if self.training and self.rank_dropout:
            kept = (torch.rand(len(matrix), 1, device=matrix.device) > self.rank_dropout).to(matrix.dtype)
            matrix = matrix * (kept / kept.mean().clamp_min(1e-6) if self.rescaled else kept)
        x, matrix = x.to(y.dtype), matrix.to(y.dtype)
        if is_linear(module):
            return y + F.linear(x, matrix)
        change: Tensor = module._conv_forward(x, matrix.view_as(module.weight), None)
        return y + change

    def deltas(self, module: Any) -> dict[str, Tensor]:
        """The change in the shape of the module's weight."""
        matrix = self.matrix() * self.scale
        return {"weight": oriented(matrix, module) if is_linear(module) else matrix.view_as(module.weight)}
