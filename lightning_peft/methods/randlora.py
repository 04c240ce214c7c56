"""RandLoRA: a full-rank change of random bases with trained scales (Albert et al., arXiv 2502.00987, 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import DeltaLayer, LinearMethod, SharedTensors, above_rank, kaiming_uniform, sizes

_BASES = ("randlora_A", "randlora_B")


@dataclass(kw_only=True)
class RandLoRA(LinearMethod):
    """``W x + s sum_j B_j diag(l_j) A diag(g_j) x`` over ``n = ceil(min(in, out) / r)`` random bases.

    ``A: (r, 1, small)`` is one for all bases, ``B: (large, n, r)``; both are random, shared by all layers and never
    trained; where the input is the larger side the product is transposed. ``l: (r, n)`` starts at zero,
    ``g: (n, small)`` at one over its longer side; ``s = randlora_alpha / r``. The bases are saved with the adapter.

    Args:
        r: rank of a basis, from 1 to the smaller side of any weight; a smaller one means more bases, and so more
            parameters.
        randlora_alpha: strength of the change; the authors take 20 times the rank.
        randlora_dropout: share of the input that the change does not see in training.
        projection_prng_key: seed of the random bases, which are the same on every machine.
        sparse: whether the bases hold only -1, 0 and 1 (a sixth, two thirds, a sixth).
        very_sparse: the same with far fewer ones, one in ``sqrt(small)``.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False
    learning_rate: float = 1e-3

    peft_type: ClassVar[str | None] = "RANDLORA"
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_weights", "save_projection", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "RandLoRA",
            [
                *range_problems(
                    self, counts=["r"], positive=["randlora_alpha", "learning_rate"], shares=["randlora_dropout"]
                ),
                "sparse and very_sparse exclude each other" if self.sparse and self.very_sparse else None,
            ],
        )

    @property
    def seeded(self) -> tuple[str, ...]:
        """The bases, where they are PEFT's: it draws dense ones in the dtype that the machine is good at."""
        return _BASES if self.sparse or self.very_sparse else ()

    def beyond(self, name: str, module: Module) -> str | None:
        """A basis of more rank than the weight, of which one more than spans it."""
        return above_rank("r", self.r, min(sizes(module)), name)

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _RandLoraLayer(module, self)

    def arrange(self, model: Module, layers: dict[str, AdapterLayer]) -> Placement:
        """The layers, and the random bases at the root."""
        shapes = [sizes(model.get_submodule(n)) for n in layers]
        widest = [max(s[i] for s in shapes) for i in (0, 1)]
        small, large = min(widest), max(widest)
        n = -(-small // self.r)
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        if self.sparse or self.very_sparse:
            chance = 1 / (2 * (math.sqrt(small) if self.very_sparse else 3))
            a, b = (
                (u > 1 - chance).float() - (u < chance).float()
                for u in (
                    torch.rand((self.r, 1, small), generator=generator),
                    torch.rand((large, n, self.r), generator=generator),
                )
            )
        else:
            a = kaiming_uniform((self.r, 1, small), generator, small)
            b = torch.cat([kaiming_uniform((large, 1, self.r), generator, self.r) for _ in range(n)], 1)
        device = device_for(model.get_submodule(next(iter(layers))))
        bases = SharedTensors({"randlora_A": (a / a.std()).to(device), "randlora_B": (b / b.std()).to(device)})
        for layer in layers.values():
            assert isinstance(layer, _RandLoraLayer)
            layer.shared = (bases,)
        return Placement({"": bases, **layers})

    def peft_name(self, key: str, model: Module) -> str:
        """The bases stand bare in a PEFT file."""
        return f"base_model.{key}" if key in _BASES else super().peft_name(key, model)


class _RandLoraLayer(DeltaLayer):
    shared: tuple[SharedTensors]  # a tuple, so that the bases are not registered in every layer

    def __init__(self, module: Module, method: RandLoRA) -> None:
        super().__init__()
        self.n_in, self.n_out = sizes(module)
        small = min(self.n_in, self.n_out)
        n = -(-small // method.r)
        device = device_for(module)
        self.randlora_lambda = Parameter(torch.zeros(method.r, n, dtype=torch.float32, device=device))
        gamma = torch.full((n, small), 1 / max(n, small), dtype=torch.float32, device=device)
        self.randlora_gamma = Parameter(gamma)
        self.scale = method.randlora_alpha / method.r
        self.p = method.randlora_dropout

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The change as two factors, ``(n r, in)`` and ``(out, n r)``, where and as ``like`` is."""
        (shared,) = self.shared
        n, small = self.randlora_gamma.shape
        a = shared.get_buffer("randlora_A")[:, :, :small].to(like)
        b = shared.get_buffer("randlora_B")[: max(self.n_in, self.n_out), :n].to(like).flatten(1)
        scaled = (a * self.randlora_lambda.to(like).unsqueeze(2) * self.randlora_gamma.to(like)).flatten(0, 1)
        # b counts its columns base by base, a its rows rank by rank; the sum pairs them in that order
        return (scaled, b) if small == self.n_in else (b.T, scaled.T)

    def change(self, x: Tensor) -> Tensor:
        first, second = self.factors(x)
        x = F.dropout(x, self.p, self.training) if self.p else x
        return F.linear(F.linear(x, first), second) * self.scale

    def delta(self) -> Tensor:
        first, second = self.factors(self.randlora_lambda)
        return second @ first * self.scale
