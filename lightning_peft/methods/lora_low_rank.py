"""What the layers of LoRA share: two factors, their strength, and the dropout before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA


def refuse_rank(name: str, r: int, limit: int, *, parameter: bool = False) -> None:
    """Refuses a rank above the smaller side of a weight, which adds numbers and no change.

    Args:
        name: what has the weight.
        r: the rank.
        limit: the smaller side.
        parameter: whether it is a parameter, not a module.

    Raises:
        ValueError: if it is above.
    """
    if r > limit:
        out = "leave it out of target_parameters" if parameter else f"exclude it (exclude_modules=[{name!r}])"
        raise ValueError(
            f"LoRA: a rank of {r} is above {limit}, the smaller side of the weight of {name!r}; lower r, give it a "
            f"rank of its own (rank_pattern={{{name!r}: {limit}}}) or {out}"
        )


class LowRank(AdapterLayer):
    """What all low-rank layers share: ``lora_A``, ``lora_B``, the scale and the dropout on A's input.

    Args:
        name: the module's name, which may have a rank and a strength of its own.
        module: the adapted module.
        method: the options.
        a: shape of A behind the rank.
        b: shape of B, with the number of outputs before the rank and what follows behind it.
        copies: how many pairs of factors lie side by side along the rank.

    Attributes:
        awaits_data: whether A is still to be taken from data.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    p: float
    awaits_data: bool

    def __init__(
        self, name: str, module: Module, method: LoRA, a: Sequence[int], b: Sequence[int], copies: int = 1
    ) -> None:
        super().__init__()
        device = device_for(module)
        r, n_out = method.rank(name), b[0]
        drawn = torch.empty(r * copies, *a, dtype=torch.float32, device=device)
        zeros = torch.zeros(n_out, r * copies, *b[1:], dtype=torch.float32, device=device)
        if method.init_lora_weights == "gaussian":
            drawn.normal_(std=1 / r)
        else:
            # the numbers of init.kaiming_uniform_(drawn, a=sqrt(5)), which would be a quarter of the layer's making
            bound = 1 / math.sqrt(math.prod(a))
            drawn.uniform_(-bound, bound)
        # put where Module.__setattr__ would: what it looks at first, each time, is a third of a layer's making
        self._parameters["lora_B"] = Parameter(zeros)
        if method.lora_fa:
            self._buffers["lora_A"] = drawn
        else:
            self._parameters["lora_A"] = Parameter(drawn)
        self.__dict__.update(scale=method.scale(name), p=method.lora_dropout, awaits_data=method.needs_data)

    @property
    def limit(self) -> int:
        """The smaller side of the weight, above which no rank adds anything."""
        return min(self.lora_A.shape[1:].numel(), self.lora_B.shape[0])

    def dropped(self, x: Tensor) -> Tensor:
        """The input as A sees it."""
        return F.dropout(x, self.p, self.training) if self.p else x
