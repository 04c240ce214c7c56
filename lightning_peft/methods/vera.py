"""VeRA: two random matrices for all layers, and vectors that scale them (Kopiczko et al., arXiv 2310.11454, 3.1)."""

from __future__ import annotations

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
from lightning_peft.methods.linear import DeltaLayer, LinearMethod, SharedTensors, kaiming_uniform, sizes


@dataclass(kw_only=True)
class VeRA(LinearMethod):
    """Vector-based random matrix adaptation: ``W x + b * B (d * A x)`` with A, B random, shared and never trained.

    ``A: (r, in)`` and ``B: (out, r)`` are cut from one pair as large as the largest target; ``d: (r)`` starts at
    ``d_initial`` and ``b: (out)`` at zero. The pair is saved with the adapter.

    Args:
        r: rank; much higher than LoRA's, since a rank costs one number a layer. It may be above a weight's sides, as
            in the paper: each of its numbers scales a direction of its own.
        projection_prng_key: seed of the random pair, which is the same on every machine.
        vera_dropout: share of the input that A does not see in training, from 0 up to but not including 1.
        d_initial: where ``d`` starts; the paper's appendix finds small values best.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; ten times LoRA's, as in the paper.

    Raises:
        ValueError: if a number is out of its range.
    """

    r: int = 256
    projection_prng_key: int = 0
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    learning_rate: float = 2e-2

    peft_type: ClassVar[str | None] = "VERA"
    seeded: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_weights", "save_projection", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems("VeRA", range_problems(self, counts=["r"], positive=["learning_rate"], shares=["vera_dropout"]))

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _VeraLayer(module, self)

    def arrange(self, model: Module, layers: dict[str, AdapterLayer]) -> Placement:
        """The layers, and the random pair at the root."""
        shapes = [sizes(model.get_submodule(n)) for n in layers]
        n_in, n_out = max(s[0] for s in shapes), max(s[1] for s in shapes)
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        a = kaiming_uniform((self.r, n_in), generator, n_in)
        b = kaiming_uniform((n_out, self.r), generator, self.r)
        device = device_for(model.get_submodule(next(iter(layers))))
        pair = SharedTensors({"vera_A": a.to(device), "vera_B": b.to(device)})
        for layer in layers.values():
            assert isinstance(layer, _VeraLayer)
            layer.shared = (pair,)
        return Placement({"": pair, **layers})

    def peft_name(self, key: str, model: Module) -> str:
        """The pair stands bare in a PEFT file."""
        return f"base_model.{key}" if key in self.seeded else super().peft_name(key, model)


class _VeraLayer(DeltaLayer):
    shared: tuple[SharedTensors]  # a tuple, so that the pair is not registered in every layer

    def __init__(self, module: Module, method: VeRA) -> None:
        super().__init__()
        self.n_in, n_out = sizes(module)
        device = device_for(module)
        self.vera_lambda_d = Parameter(torch.full((method.r,), method.d_initial, dtype=torch.float32, device=device))
        self.vera_lambda_b = Parameter(torch.zeros(n_out, dtype=torch.float32, device=device))
        self.p = method.vera_dropout

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B cut to the module's size, where and as ``like`` is."""
        (shared,) = self.shared
        a, b = shared.get_buffer("vera_A"), shared.get_buffer("vera_B")
        return a[:, : self.n_in].to(like), b[: len(self.vera_lambda_b)].to(like)

    def change(self, x: Tensor) -> Tensor:
        a, b = self.pair(x)
        x = F.dropout(x, self.p, self.training) if self.p else x
        hidden = F.linear(x, a) * self.vera_lambda_d.to(x.dtype)
        return F.linear(hidden, b) * self.vera_lambda_b.to(x.dtype)

    def delta(self) -> Tensor:
        a, b = self.pair(self.vera_lambda_b)
        return (self.vera_lambda_b.unsqueeze(1) * b) @ (self.vera_lambda_d.unsqueeze(1) * a)

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The scaled pair."""
        a, b = self.pair(self.vera_lambda_b)
        return {"weight": (self.vera_lambda_d.unsqueeze(1) * a, self.vera_lambda_b.unsqueeze(1) * b)}
