"""Compacter: bottlenecks whose weights are sums of Kronecker products (Karimi Mahabadi et al., arXiv 2106.04647, 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.methods.blocks import ACTIVATIONS, BlockLayer, Place, find_blocks
from lightning_peft.methods.linear import SharedTensors, near_divisors


@dataclass(kw_only=True)
class Compacter:
    """A bottleneck in every layer, ``h + up(act(down(h)))``, of weights ``sum_i A_i kron (s_i t_i)``.

    With ``n = phm_dim``: ``A: (n, n, n)``, ``s: (n, in / n, rank)``, ``t: (n, rank, out / n)``, so a layer costs about
    ``in + out`` numbers instead of ``in * out``. ``t`` of ``up`` starts at zero, so the model starts as the base.

    Args:
        mh_adapter: adapt the multi-head attention's output; off is the paper's Compacter++.
        output_adapter: adapt the feed-forward's output.
        reduction_factor: hidden size divided by the bottleneck's, above 0; 32 as in the paper.
        non_linearity: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        phm_dim: number n of products; it must divide the hidden size and the bottleneck.
        phm_rank: rank of each ``s_i t_i``, from 1 to the bottleneck's size divided by n.
        shared_phm_rule: whether all layers share one A; otherwise each ``down`` and each ``up`` has its own.
        attention_modules: the attention blocks of a model that is not known: names, suffixes or an expression.
        feed_forward_modules: the same for its feed-forward blocks.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range, or neither block is chosen.
    """

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float = 32
    non_linearity: str = "gelu"
    phm_dim: int = 4
    phm_rank: int = 1
    shared_phm_rule: bool = True
    attention_modules: list[str] | str | None = None
    feed_forward_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "Compacter",
            [
                *range_problems(self, counts=["phm_dim", "phm_rank"], positive=["reduction_factor", "learning_rate"]),
                None if self.mh_adapter or self.output_adapter else "choose mh_adapter, output_adapter or both",
                f"non_linearity {self.non_linearity!r} is unknown{nearest(self.non_linearity, ACTIVATIONS)}"
                if self.non_linearity not in ACTIVATIONS
                else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """A bottleneck for each chosen block, and the shared A at the root.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if a chosen kind of block is neither known nor named, or ``phm_dim`` does not fit it.
        """
        layers: dict[str, AdapterLayer] = {}
        shared = None
        for place in find_blocks(model, self):
            module = model.get_submodule(place.name)
            if shared is None and self.shared_phm_rule:
                shared = layers[""] = SharedTensors({"phm_rule": _rule(self.phm_dim, device_for(module))}, train=True)
            layers[place.name] = _CompacterLayer(self, module, place, shared)
        return Placement(layers)


def _rule(n: int, device: torch.device) -> Tensor:
    return torch.randn(n, n, n, dtype=torch.float32, device=device) * 0.5


def _way_out(n: int, hidden: int, size: int) -> str:
    """Which number to choose instead: a factor whose bottleneck is a multiple of n, or an n that divides both."""
    if hidden % n:
        return "choose another phm_dim: " + near_divisors(n, math.gcd(hidden, size))
    fit = next(m for m in range(max(n, size // n * n), 0, -n) if hidden % m == 0)
    return f"choose another reduction_factor, such as {hidden // fit}"


def phm(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x`` times ``sum_i A_i kron (s_i t_i)``, without ever making that matrix.

    Args:
        x: ``(..., in)``.
        rule: A, ``(n, n, n)``.
        left: s, ``(n, in / n, rank)``.
        right: t, ``(n, rank, out / n)``.

    Returns:
        ``(..., out)``.
    """
    n = len(rule)
    inner = torch.einsum("...ab,ibr->...air", x.reshape(*x.shape[:-1], n, -1), left)
    mixed = torch.einsum("...air,iac->...cir", inner, rule)
    return torch.einsum("...cir,ird->...cd", mixed, right).flatten(-2)


class _CompacterLayer(BlockLayer):
    """``down``: ``(hidden, m)`` and ``up``: ``(m, hidden)``, sums of products, ``m = hidden / reduction_factor``."""

    def __init__(self, method: Compacter, module: Module, place: Place, shared: SharedTensors | None) -> None:
        super().__init__(place)
        n, rank, hidden = method.phm_dim, method.phm_rank, place.hidden
        size = max(1, int(hidden / method.reduction_factor))
        if hidden % n or size % n:
            raise ValueError(
                f"Compacter: phm_dim={n} must divide the hidden size {hidden} and the bottleneck {size} at "
                f"{place.name!r}; {_way_out(n, hidden, size)}"
            )
        most = min(hidden, size) // n
        if rank > most:
            raise ValueError(
                f"Compacter: phm_rank={rank} is above {most}, the smaller side of the factors at {place.name!r} "
                f"(a bottleneck of {size} in phm_dim={n} parts); lower it to {most} or less, or widen the bottleneck "
                "by a lower reduction_factor"
            )
        device = device_for(module)
        for name, n_in, n_out in (("down", hidden, size), ("up", size, hidden)):
            left = torch.empty(n, n_in // n, rank, dtype=torch.float32, device=device)
            right = torch.zeros(n, rank, n_out // n, dtype=torch.float32, device=device)
            init.normal_(left, std=(n / n_in) ** 0.5)
            if name == "down":
                init.normal_(right, std=rank**-0.5)
            self.register_parameter(f"{name}_left", Parameter(left))
            self.register_parameter(f"{name}_right", Parameter(right))
            self.register_parameter(f"{name}_bias", Parameter(torch.zeros(n_out, dtype=torch.float32, device=device)))
            if shared is None:
                self.register_parameter(f"{name}_rule", Parameter(_rule(n, device)))
        self.shared = (shared,)  # a tuple, so that A is not registered in every layer
        self.non_linearity = method.non_linearity

    def _through(self, name: str, x: Tensor) -> Tensor:
        shared = self.shared[0]
        rule = self.get_parameter(f"{name}_rule") if shared is None else shared.get_parameter("phm_rule")
        left, right, bias = (self.get_parameter(f"{name}_{part}").to(x.dtype) for part in ("left", "right", "bias"))
        return phm(x, rule.to(x.dtype), left, right) + bias

    def change(self, h: Tensor) -> Tensor:
        """``up(act(down(h)))``, ``(..., hidden)`` -> ``(..., hidden)``."""
        return self._through("up", ACTIVATIONS[self.non_linearity](self._through("down", h)))
