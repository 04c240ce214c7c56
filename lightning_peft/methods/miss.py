"""MiSS: one small matrix, shared by all shards of the weight (Kang and Yin, arXiv 2409.15371, 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import (
    DeltaLayer,
    LinearMethod,
    is_readable,
    module_below,
    near_divisors,
    oriented,
    sizes,
    weight_of,
)

_INITS = (True, "mini", "bat")


@dataclass(kw_only=True)
class MiSS(LinearMethod):
    """Matrix shard sharing: the input's shards of r features are summed and sent through one ``D: (r, out)``.

    ``W x + D^T (x_1 + x_2 + ...)``, with the last shard filled up with zeros; D starts at zero.

    Args:
        r: length of a shard, up to the number of inputs. More shards, that is a smaller r, mean fewer parameters.
        miss_dropout: share of the input that D does not see in training, from 0 up to but not including 1.
        init_weights: True for the above; ``"mini"`` shares D over the outputs too, ``(r, mini_r)``; ``"bat"``
            trains ``D: (out / r, r, r)`` and changes each block of the weight by ``W D + D``.
        mini_r: width of D with ``"mini"``; it must divide the number of output features.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; a shard's sum is larger than an input, so the steps are below LoRA's.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    r: int = 64
    miss_dropout: float = 0.0
    init_weights: bool | str = True
    mini_r: int = 1
    learning_rate: float = 5e-4

    peft_type: ClassVar[str | None] = "MISS"
    kinds: ClassVar[str] = "Linear"
    peft_idle: ClassVar[tuple[str, ...]] = ("runtime_config",)

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "MiSS",
            [
                *range_problems(self, counts=["r", "mini_r"], positive=["learning_rate"], shares=["miss_dropout"]),
                f"init_weights must be one of {_INITS}, but got {self.init_weights!r}"
                if self.init_weights not in _INITS
                else None,
                "miss_dropout has no place with init_weights='bat', whose change is not applied to the input"
                if self.init_weights == "bat" and self.miss_dropout
                else None,
            ],
        )

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module.

        Raises:
            ValueError: if r or mini_r does not fit the module.
        """
        n_in, n_out = sizes(module)
        bat, mini = self.init_weights == "bat", self.init_weights == "mini"
        raise_problems(
            f"MiSS at {name!r}, {n_in} inputs and {n_out} outputs",
            [
                f"r={self.r} is above {n_in}, the number of inputs; lower it to {n_in} or less, or exclude the module "
                f"(exclude_modules=[{name!r}])"
                if self.r > n_in
                else None,
                "init_weights='bat' changes the weight by what it is, but it is offloaded or quantized; choose True"
                if bat and not is_readable(module)
                else None,
                f"r={self.r} must divide both with init_weights='bat'; {near_divisors(self.r, math.gcd(n_in, n_out))}"
                if bat and (n_in % self.r or n_out % self.r)
                else None,
                f"mini_r={self.mini_r} must divide the outputs; {near_divisors(self.mini_r, n_out)}"
                if mini and n_out % self.mini_r
                else None,
            ],
        )
        return _BatLayer(module, self) if bat else _MissLayer(module, self)


class _MissLayer(DeltaLayer):
    def __init__(self, module: Module, method: MiSS) -> None:
        super().__init__()
        self.n_in, self.n_out = sizes(module)
        width = method.mini_r if method.init_weights == "mini" else self.n_out
        shape = (method.r, width)
        self.miss_block = Parameter(torch.zeros(shape, dtype=torch.float32, device=device_for(module)))
        self.p = method.miss_dropout

    def _block(self) -> Tensor:
        width = self.miss_block.shape[1]
        return self.miss_block if width == self.n_out else self.miss_block.repeat(1, self.n_out // width)

    def change(self, x: Tensor) -> Tensor:
        block = self._block()
        r = len(block)
        shards = F.pad(x, (0, -self.n_in % r)).reshape(*x.shape[:-1], -1, r)
        shards = F.dropout(shards, self.p, self.training) if self.p else shards
        return shards.sum(-2) @ block.to(x.dtype)

    def delta(self) -> Tensor:
        block = self._block()
        return block.T.repeat(1, -(-self.n_in // len(block)))[:, : self.n_in]


class _BatLayer(AdapterLayer):
    """``(W + W D + D) x``, block by block: rows ``i r`` to ``(i + 1) r`` of W change by ``D_i``."""

    def __init__(self, module: Module, method: MiSS) -> None:
        super().__init__()
        shape = (sizes(module)[1] // method.r, method.r, method.r)
        self.miss_block = Parameter(torch.zeros(shape, dtype=torch.float32, device=device_for(module)))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + F.linear(x.to(y.dtype), self._delta(module_below(base)).to(y.dtype))

    def _delta(self, module: Any) -> Tensor:
        weight = weight_of(module).to(self.miss_block.dtype)
        r = self.miss_block.shape[-1]
        # (rows of a block, row blocks, column blocks, columns of a block): D_i is one for all column blocks
        blocks = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).permute(2, 0, 1, 3)
        changed = blocks @ self.miss_block + self.miss_block
        return changed.permute(1, 2, 0, 3).reshape(weight.shape)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        return {"weight": oriented(self._delta(module), module)}
