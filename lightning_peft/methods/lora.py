"""LoRA: a low-rank change beside a frozen weight, ``h = W x + s B A x`` (Hu et al., arXiv 2106.09685, 4.1).

``A: (r, in)`` starts random, ``B: (out, r)`` at zero; ``s = alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA,
arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Embedding, Linear, Module, MultiheadAttention, Parameter, init
from torch.nn import functional as F

from lightning_peft.core.adapted import Base, module_of, site_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import class_of, is_conv1d, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.problems import raise_problems, refuse_unknown
from lightning_peft.ops.lora_linear import count, lora_linear


@dataclass
class LoRA:
    """Low-rank adaptation of linear, Conv1D, embedding, convolution and attention modules.

    Args:
        r: rank of the change, 1 or more. 8 is enough for most single tasks; more rank asks for more data.
        lora_alpha: strength of the change, above 0. 16, twice the default rank, keeps the learning rate's range.
        lora_dropout: share of the input that A does not see in training, from 0 up to but not including 1.
        use_rslora: divide alpha by ``sqrt(r)`` instead of ``r``, which keeps high ranks learning.
        target_modules: a list of exact names or dotted suffixes, a regular expression for the whole name, or
            ``"all-linear"`` for every linear layer but the output head. All layers is what works best.
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        bias: which biases of the base train too: ``"none"``, ``"lora_only"`` (of adapted modules), ``"all"``.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; about ten times that of full fine-tuning.

    Raises:
        ValueError: if a number or a choice is out of its range.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import adapt
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> adapter = adapt(model, LoRA(r=2, target_modules=["0"]))
        >>> sorted(adapter.state_dict())
        ['0.lora_A', '0.lora_B']
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    learning_rate: float = 2e-3

    peft_type: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        biases = ("none", "lora_only", "all")
        raise_problems(
            "LoRA",
            [
                f"r must be a whole number of 1 or more, but got {self.r!r}" if not _is_rank(self.r) else None,
                f"lora_alpha must be above 0, but got {self.lora_alpha}" if self.lora_alpha <= 0 else None,
                f"lora_dropout must be at least 0 and below 1, but got {self.lora_dropout}"
                if not 0 <= self.lora_dropout < 1
                else None,
                f"bias must be one of {biases}, but got {self.bias!r}" if self.bias not in biases else None,
                f"learning_rate must be above 0, but got {self.learning_rate}" if self.learning_rate <= 0 else None,
            ],
        )

    @property
    def scale(self) -> float:
        """The factor ``s`` on the change."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def place(self, model: Module) -> Placement:
        """A low-rank layer for each matched module.

        Args:
            model: the root; it is not changed.

        Returns:
            The layers, and the biases that train in place.

        Raises:
            ValueError: if nothing matches or a matched module has no low-rank form.
        """
        names = match_modules(
            model,
            self.target_modules,
            exclude=self.exclude_modules,
            layers=self.layers_to_transform,
            suits=lambda m: _layer_for(m) is not None,
            kinds="Linear, Conv1D, Embedding, Conv1d, Conv2d or MultiheadAttention",
        )
        layers: dict[str, AdapterLayer] = {}
        for name in names:
            module = model.get_submodule(name)
            kind = _layer_for(module)
            assert kind is not None
            layers[name] = kind(name, module, self)
        return Placement(layers, in_place=self._biases(model, names))

    def _biases(self, model: Module, names: Sequence[str]) -> list[str]:
        if self.bias == "none":
            return []
        biases = [n for n, _ in model.named_parameters() if n.rpartition(".")[2].endswith("bias")]
        if self.bias == "all":
            return biases
        return [n for n in biases if any(n.startswith(f"{name}.") for name in names)]

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; the targets are written as resolved names."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "bias": self.bias,
            "target_modules": sorted(placed),
            "fan_in_fan_out": all(is_conv1d(model.get_submodule(n)) for n in placed),
            "init_lora_weights": True,
        }

    def peft_name(self, key: str, model: Module) -> str:
        """``q_proj.lora_A`` is ``base_model.model.q_proj.lora_A.weight``; embeddings' tensors have no ``.weight``."""
        place, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            parent, _, child = place.rpartition(".")
            if child == "out_proj" and isinstance(model.get_submodule(parent), MultiheadAttention):
                place = f"{parent}.base_layer.out_proj"
            return f"base_model.model.{place}.{leaf}.weight"
        site = site_of(model.get_submodule(place)) if leaf.endswith("bias") else None
        if site is not None and any(isinstance(x, (_LowRank, _EmbeddingLayer)) for x in site.layers.values()):
            return f"base_model.model.{place}.base_layer.{leaf}"
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> LoRA:
        """The LoRA that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here, such as DoRA.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        # these say nothing unless another option, which is refused, is on
        idle = ["fan_in_fan_out", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"]
        refuse_unknown("LoRA", config, known=[*names, *idle])
        return cls(**{n: config[n] for n in names if config.get(n) is not None})


def _is_rank(r: Any) -> bool:
    return isinstance(r, int) and not isinstance(r, bool) and r >= 1


class _LowRank(AdapterLayer):
    """What all low-rank layers share: ``lora_A``, ``lora_B``, the scale and the dropout on A's input."""

    def __init__(self, method: LoRA, module: Module, a: Sequence[int], b: Sequence[int]) -> None:
        super().__init__()
        device = device_for(module)
        self.lora_A = Parameter(torch.empty(*a, dtype=torch.float32, device=device))
        self.lora_B = Parameter(torch.zeros(*b, dtype=torch.float32, device=device))
        init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = method.scale
        self.p = method.lora_dropout

    def dropped(self, x: Tensor) -> Tensor:
        """The input as A sees it."""
        return F.dropout(x, self.p, self.training) if self.p else x


class _LinearLayer(_LowRank):
    """``base(x) + s B A x`` on a Linear or Conv1D; x: ``(..., in)`` -> ``(..., out)``."""

    def __init__(self, name: str, module: Any, method: LoRA) -> None:
        if is_conv1d(module):
            n_in, n_out = module.weight.shape
        else:
            n_in, n_out = module.in_features, module.out_features
        super().__init__(method, module, (method.r, n_in), (n_out, method.r))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        weight = base.plain_weight(x) if isinstance(base, Base) else None
        if weight is not None and isinstance(base, Base) and not (self.p and self.training):
            count("fused")
            bias = base.module._parameters["bias"]
            return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scale)
        count("plain")
        y: Tensor = base(x)
        a, b = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype)
        change = F.linear(F.linear(self.dropped(x).to(y.dtype), a), b)
        return y + change * self.scale

    def deltas(self, module: Module) -> dict[str, Tensor]:
        delta = self.lora_B @ self.lora_A * self.scale
        return {"weight": delta.T if is_conv1d(module) else delta}


class _EmbeddingLayer(AdapterLayer):
    """``base(ids) + s B A[:, ids]`` on an Embedding; A: ``(r, vocabulary)`` at zero, B: ``(hidden, r)``."""

    def __init__(self, name: str, module: Embedding, method: LoRA) -> None:
        super().__init__()
        device = device_for(module)
        a = torch.zeros(method.r, module.num_embeddings, dtype=torch.float32, device=device)
        b = torch.randn(module.embedding_dim, method.r, dtype=torch.float32, device=device)
        self.lora_embedding_A = Parameter(a)
        self.lora_embedding_B = Parameter(b)
        # Gemma-like embeddings multiply what they look up
        self.scale = method.scale
        self.embed_scale = getattr(module, "embed_scale", None)

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        y: Tensor = base(ids)
        rows = F.embedding(ids, self.lora_embedding_A.T).to(y.dtype)
        change = rows @ self.lora_embedding_B.T.to(y.dtype) * self.scale
        if self.embed_scale is not None:
            change = change * self.embed_scale
        return y + change

    def deltas(self, module: Module) -> dict[str, Tensor]:
        return {"weight": (self.lora_embedding_B @ self.lora_embedding_A).T * self.scale}


class _ConvLayer(_LowRank):
    """``base(x) + s B(A(x))`` with A a convolution of the base's geometry into r channels and B a 1x1 one."""

    def __init__(self, name: str, module: Conv1d | Conv2d, method: LoRA) -> None:
        if module.groups != 1:
            raise ValueError(
                f"LoRA: {name!r} is a convolution in {module.groups} groups, for which there is no low-rank form "
                "that can be merged; expected groups=1, so exclude it"
            )
        ones = [1] * len(module.kernel_size)
        a = (method.r, module.in_channels, *module.kernel_size)
        super().__init__(method, module, a, (module.out_channels, method.r, *ones))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        y: Tensor = base(x)
        module = module_of(base)
        h: Tensor = module._conv_forward(self.dropped(x).to(y.dtype), self.lora_A.to(y.dtype), None)  # type: ignore[operator]
        b = self.lora_B.flatten(1).to(y.dtype)
        # A 1x1 convolution is a product over the channels, whatever the number of spatial dimensions.
        channel = y.dim() - (self.lora_A.dim() - 1)
        change: Tensor = torch.tensordot(b, h, ([1], [channel])).movedim(0, channel)
        return y + change * self.scale

    def deltas(self, module: Module) -> dict[str, Tensor]:
        delta = torch.tensordot(self.lora_B.flatten(1), self.lora_A, ([1], [0]))
        return {"weight": delta * self.scale}


class _AttentionLayer(_LowRank):
    """LoRA on the projections of ``nn.MultiheadAttention``, which reads weights and calls nothing.

    ``lora_A``: ``(r, embed)``, ``lora_B``: ``(3 embed, r)`` on the joint input projection, a second pair under
    ``out_proj``. The attention runs on a view of the module with ``W + s B A`` in place of ``W``.
    """

    def __init__(self, name: str, module: MultiheadAttention, method: LoRA) -> None:
        raise_problems(
            f"LoRA on the nn.MultiheadAttention {name!r}",
            [
                None if module._qkv_same_embed_dim else "kdim and vdim must equal embed_dim",
                "lora_dropout must be 0, since the projections' input is not seen from outside"
                if method.lora_dropout
                else None,
            ],
        )
        n = module.embed_dim
        super().__init__(method, module, (method.r, n), (3 * n, method.r))
        self.out_proj = _LowRank(method, module, (method.r, n), (n, method.r))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(base, Base) or base.instance_forward is not None:
            raise RuntimeError(
                "LoRA on nn.MultiheadAttention runs with changed weights, so it must be the innermost adapter "
                "and the module must have no forward of its own; deactivate the other adapter"
            )
        module = base.module
        changed: dict[str, Tensor] = {}
        for key, delta in self.deltas(module).items():
            weight = module.get_parameter(key)
            changed[key] = weight + delta.to(weight.dtype)
        return base.cls.forward(base.view({**base.casts(), **changed}), *args, **kwargs)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        return {
            "in_proj_weight": self.lora_B @ self.lora_A * self.scale,
            "out_proj.weight": self.out_proj.lora_B @ self.out_proj.lora_A * self.scale,
        }


_LAYERS: dict[type, Callable[..., AdapterLayer]] = {
    Linear: _LinearLayer,
    Embedding: _EmbeddingLayer,
    Conv1d: _ConvLayer,
    Conv2d: _ConvLayer,
    MultiheadAttention: _AttentionLayer,
}


def _layer_for(module: Module) -> Callable[..., AdapterLayer] | None:
    if is_conv1d(module):
        return _LinearLayer
    return next((_LAYERS[c] for c in class_of(module).__mro__ if c in _LAYERS), None)
