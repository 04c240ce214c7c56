"""AdaLoRA: a change in the form of an SVD whose rank moves to where it counts (Zhang et al., arXiv 2303.10512).

``D = s P diag(E) Q`` with ``Q = lora_A: (r, in)``, ``E = lora_E: (r, 1)``, ``P = lora_B: (out, r)``. After each step
every triplet (row of Q, value, column of P) gets a score of how much the loss depends on it, and the values of all
but the best of all layers together are set to zero; how many stay falls from ``init_r`` to ``target_r`` a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.core.sharded import cut_like, whole
from lightning_peft.core.tree import AdapterTree
from lightning_peft.methods.linear import DeltaLayer, LinearMethod, above_rank, sizes

_FACTORS = ("lora_A", "lora_E", "lora_B")
_STATE = ("_ipt", "_unc", "_mask")


@dataclass(kw_only=True)
class AdaLoRA(LinearMethod):
    """Low-rank adaptation that starts with a rank of ``init_r`` everywhere and ends with ``target_r`` on average.

    The schedule runs by itself under a Trainer; in a loop of your own call ``adapter.before_step`` and
    ``adapter.after_step``. ``E`` starts at zero, so the model starts as the base.

    Args:
        target_r: average rank at the end, 1 or more.
        init_r: rank of every module at the start, ``target_r`` or more and no more than the smaller side of any weight;
            the paper takes 1.5 times as much.
        lora_alpha: strength of the change, divided by ``init_r``; above 0.
        lora_dropout: share of the input that Q does not see in training, from 0 up to but not including 1.
        tinit: steps before the first triplet goes.
        tfinal: steps at the end in which the choice stands; ``tinit + tfinal`` must be below the run's steps.
        deltaT: steps between two choices.
        beta1: memory of the scores' mean, between 0 and 1.
        beta2: memory of the scores' uncertainty, between 0 and 1.
        orth_reg_weight: weight of ``|P^T P - I| + |Q Q^T - I|``, averaged over all factors, in the loss; 0 or more.
        total_step: steps of the training; None takes the Trainer's.
        rank_pattern: which of the ``init_r`` triplets a module has, by module; in files that PEFT has pruned.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number is out of its range.
    """

    target_r: int = 8
    init_r: int = 12
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    learning_rate: float = 2e-3

    peft_type: ClassVar[str | None] = "ADALORA"
    peft_idle: ClassVar[tuple[str, ...]] = (
        "fan_in_fan_out",
        "init_lora_weights",
        "runtime_config",
        "r",
        "megatron_core",
        "qalora_group_size",
    )

    def __post_init__(self) -> None:
        check_types(self)
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        steps = {"tinit": self.tinit, "tfinal": self.tfinal, "orth_reg_weight": self.orth_reg_weight}
        raise_problems(
            "AdaLoRA",
            [
                *range_problems(
                    self,
                    counts=["target_r", "deltaT"],
                    positive=["lora_alpha", "learning_rate"],
                    shares=["lora_dropout"],
                ),
                f"init_r must be target_r ({self.target_r}) or more, but got {self.init_r}"
                if self.init_r < self.target_r
                else None,
                *(f"{n} must be 0 or more, but got {v}" if v < 0 else None for n, v in steps.items()),
                *(f"{n} must lie between 0 and 1, but got {v}" if not 0 < v < 1 else None for n, v in betas.items()),
                self._late(self.total_step) if self.total_step is not None else None,
            ],
        )

    def _late(self, total: int) -> str | None:
        if self.tinit + self.tfinal < total:
            return None
        return (
            f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the {total} steps for the rank to fall; "
            "lower them or train longer"
        )

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _SVDLayer(name, module, self)

    def beyond(self, name: str, module: Module) -> str | None:
        """A start with more triplets than the weight has singular values."""
        return above_rank("init_r", self.init_r, min(sizes(module)), name)

    def arrange(self, model: Module, layers: dict[str, AdapterLayer]) -> Any:
        """The layers, once every pattern of ranks is known to belong to one."""
        lost = [n for n in self.rank_pattern or {} if n not in layers]
        if lost:
            raise ValueError(f"AdaLoRA: rank_pattern: {lost[0]!r} is no target module{nearest(lost[0], layers)}")
        return super().arrange(model, layers)

    @property
    def scheduled(self) -> bool:
        """Always: the rank falls while it trains."""
        return True

    def check_schedule(self, total: int) -> None:
        """Refuses a training too short for ``tinit`` and ``tfinal``."""
        raise_problems("AdaLoRA", [self._late(self.total_step or total)])

    def before_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """Adds the gradient of the regularization, which keeps P and Q near orthonormal (3.1)."""
        self.check_schedule(total)
        if self.orth_reg_weight:
            trained = [p for layer in _layers(tree) for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
            factors = [f for layer in _layers(tree) for f in layer.factors() if f.requires_grad]
            grads = torch.autograd.grad(self.orth_reg_weight * orthogonality(factors), trained)
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    @torch.no_grad()
    def after_step(self, model: Module, tree: AdapterTree, step: int, total: int) -> None:
        """Scores the triplets and sets the values of the worst to zero (3.2, 3.3)."""
        end = (self.total_step or total) - self.tfinal
        layers = _layers(tree)
        if step < end:
            for layer in layers:
                layer.score(self.beta1, self.beta2)
        if step == end or (self.tinit < step < end and step % self.deltaT == 0):
            self._choose(layers, 1 - (step - self.tinit) / (end - self.tinit))
        if step >= end:
            for layer in layers:
                layer.mask()

    def _choose(self, layers: list[_SVDLayer], left: float) -> None:
        """Keeps as many triplets as the budget allows.

        Args:
            layers: all layers of the adapter.
            left: share of the falling phase that is still to come; the budget falls with its cube (eq. 11).
        """
        first, last = sum(len(layer.lora_A) for layer in layers), self.target_r * len(layers)
        gone = first - int((first - last) * left**3 + last)
        if gone < 1:
            return
        scores = [layer.importance() for layer in layers]
        if not any(s.any() for s in scores):
            if all(layer.lora_E.grad is None for layer in layers):
                raise RuntimeError(
                    "AdaLoRA: there are no gradients to score by; call after_step between optimizer.step() and "
                    "zero_grad()"
                )
            return  # every step so far overflowed
        threshold = torch.cat(scores).kthvalue(gone).values
        for layer, score in zip(layers, scores, strict=True):
            layer.lora_E_mask.copy_((score > threshold).unsqueeze(1))
            layer.mask()

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; PEFT wants a number of steps even to load."""
        pattern = {f"{n}.lora_E": kept for n, kept in (self.rank_pattern or {}).items()}
        steps = self.total_step or self.tinit + self.tfinal + 1
        return {**super().peft_config(model, placed), "rank_pattern": pattern or None, "total_step": steps}

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The three factors; the scores behind the choice are the training's."""
        return {k: t for k, t in tensors.items() if not k.endswith(_STATE)}

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The three factors, and scores that are yet to be made."""
        tensors = dict(stored)
        for key, tensor in stored.items():
            if key.endswith(_FACTORS):
                tensors |= {f"{key}{s}": torch.zeros_like(tensor) for s in ("_ipt", "_unc")}
            if key.endswith("lora_E"):
                tensors[f"{key}_mask"] = torch.ones_like(tensor)
        return tensors

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Self:
        """The AdaLoRA that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here.
        """
        pattern = {k.removesuffix(".lora_E"): kept for k, kept in (config.get("rank_pattern") or {}).items()}
        # what a file leaves out is PEFT's default, which is another here
        return super().from_peft_config({"lora_alpha": 8, **config, "rank_pattern": pattern or None})


def orthogonality(factors: Sequence[Tensor]) -> Tensor:
    """The mean of ``|F F^T - I|`` (Frobenius) over factors whose rows ought to be orthonormal.

    Args:
        factors: each ``(r, n)``.
    """
    return torch.stack([(f @ f.T - torch.eye(len(f)).to(f)).norm() for f in factors]).mean()


def _layers(tree: AdapterTree) -> list[_SVDLayer]:
    return [layer for layer in tree.layers_by_module.values() if isinstance(layer, _SVDLayer)]


class _SVDLayer(DeltaLayer):
    """``base(x) + s P (E * Q x)`` with scores for each number: their mean ``_ipt`` and uncertainty ``_unc``."""

    lora_A: Parameter
    lora_B: Parameter
    lora_E: Parameter
    lora_E_mask: Tensor

    def __init__(self, name: str, module: Module, method: AdaLoRA) -> None:
        super().__init__()
        n_in, n_out = sizes(module)
        r = sum(method.rank_pattern[name]) if name in (method.rank_pattern or {}) else method.init_r  # type: ignore[index]
        shapes = {"lora_A": (r, n_in), "lora_E": (r, 1), "lora_B": (n_out, r)}
        device = device_for(module)
        for key, shape in shapes.items():
            start = torch.zeros(shape, dtype=torch.float32, device=device)
            for suffix in ("_ipt", "_unc"):
                self.register_buffer(key + suffix, torch.zeros_like(start))
            setattr(self, key, Parameter(start if key == "lora_E" else start.normal_(std=0.02)))
        self.register_buffer("lora_E_mask", torch.ones(r, 1, dtype=torch.float32, device=device))
        # PEFT's offset against a rank of zero, kept so that its files mean the same here
        self.scale = method.lora_alpha / (method.init_r + 1e-5)
        self.p = method.lora_dropout

    def change(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.p, self.training) if self.p else x
        return F.linear(F.linear(x, (self.lora_A * self.lora_E).to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        return self.lora_B @ (self.lora_A * self.lora_E) * self.scale

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The triplets, their values in the first factor."""
        return {"weight": (self.lora_A * self.lora_E, self.lora_B * self.scale)}

    def score(self, beta1: float, beta2: float) -> None:
        """Moves the scores by the step's sensitivities ``|w dL/dw|`` (eq. 8 to 10)."""
        for key in _FACTORS:
            parameter = self.get_parameter(key)
            if parameter.grad is None:
                continue
            value, grad = whole(parameter), whole(parameter.grad)
            # a step that overflowed in 16 bits was skipped and says nothing
            if not torch.isfinite(grad).all():
                continue
            mean, uncertainty = self.get_buffer(f"{key}_ipt"), self.get_buffer(f"{key}_unc")
            now = (value * grad).abs()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            uncertainty.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Q and the transpose of P, whose rows ought to be orthonormal."""
        return whole(self.lora_A), whole(self.lora_B).T

    def mask(self) -> None:
        """Sets the values of the triplets that are gone to zero."""
        self.lora_E.mul_(cut_like(self.lora_E_mask, self.lora_E))

    def importance(self) -> Tensor:
        """One score for each triplet, ``(r,)``: its value's, and the means of its two vectors' (eq. 7)."""
        a, e, b = (self.get_buffer(f"{k}_ipt") * self.get_buffer(f"{k}_unc") for k in _FACTORS)
        return e.squeeze(1) + a.mean(1) + b.mean(0)
