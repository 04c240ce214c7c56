"""The layers of LoRA: what a low-rank change looks like beside each kind of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Embedding, Linear, Module, MultiheadAttention, Parameter
from torch.nn import functional as F

from lightning_peft.core.base import Base, module_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import class_of, is_conv1d
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.lora_low_rank import LowRank
from lightning_peft.methods.lora_on_linear import LinearLayer

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA


class EmbeddingLayer(AdapterLayer):
    """``base(ids) + s B A[:, ids]`` on an Embedding; A: ``(r, vocabulary)`` at zero, B: ``(hidden, r)``."""

    def __init__(self, name: str, module: Embedding, method: LoRA) -> None:
        super().__init__()
        device = device_for(module)
        r = method.rank(name)
        a = torch.zeros(r, module.num_embeddings, dtype=torch.float32, device=device)
        b = torch.randn(module.embedding_dim, r, dtype=torch.float32, device=device)
        self.lora_embedding_A = Parameter(a)
        self.lora_embedding_B = Parameter(b)
        self.limit = min(module.num_embeddings, module.embedding_dim)
        self.scale = method.scale(name)
        self.padding_idx = module.padding_idx
        # Gemma-like embeddings multiply what they look up
        self.embed_scale = getattr(module, "embed_scale", None)

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Runs the module and adds the change."""
        y: Tensor = base(ids)
        # as in the module itself the padding's row does not train
        rows = F.embedding(ids, self.lora_embedding_A.T, self.padding_idx).to(y.dtype)
        change = rows @ self.lora_embedding_B.T.to(y.dtype) * self.scale
        if self.embed_scale is not None:
            change = change * self.embed_scale
        return y + change

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of the weight."""
        return {"weight": (self.lora_embedding_B @ self.lora_embedding_A).T * self.scale}

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Its factors."""
        return {"weight": (self.lora_embedding_A, self.lora_embedding_B * self.scale)}


class ConvLayer(LowRank):
    """``base(x) + s B(A(x))`` with A a convolution of the base's geometry into r channels and B a 1x1 one."""

    def __init__(self, name: str, module: Conv1d | Conv2d | Conv3d, method: LoRA) -> None:
        if module.groups != 1:
            raise ValueError(
                f"LoRA: {name!r} is a convolution in {module.groups} groups, for which there is no low-rank form "
                "that can be merged; expected groups=1, so exclude it"
            )
        ones = [1] * len(module.kernel_size)
        a = (module.in_channels, *module.kernel_size)
        super().__init__(name, module, method, a, (module.out_channels, *ones))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """Runs the module and adds the change."""
        y: Tensor = base(x)
        module = module_of(base)
        h: Tensor = module._conv_forward(self.dropped(x).to(y.dtype), self.lora_A.to(y.dtype), None)  # type: ignore[operator]
        b = self.lora_B.flatten(1).to(y.dtype)
        # A 1x1 convolution is a product over the channels, whatever the number of spatial dimensions.
        channel = y.dim() - (self.lora_A.dim() - 1)
        change: Tensor = torch.tensordot(b, h, ([1], [channel])).movedim(0, channel)
        return y + change * self.scale

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of the weight."""
        delta = torch.tensordot(self.lora_B.flatten(1), self.lora_A, ([1], [0]))
        return {"weight": delta * self.scale}

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Its factors, the kernel's places beside the input channels."""
        return {"weight": (self.lora_A.flatten(1), self.lora_B.flatten(1) * self.scale)}


class AttentionLayer(LowRank):
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
        super().__init__(name, module, method, (n,), (3 * n,))
        self.out_proj = LowRank(name, module, method, (n,), (n,))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the module and adds the change."""
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
        """The change of the weight."""
        return {
            "in_proj_weight": self.lora_B @ self.lora_A * self.scale,
            "out_proj.weight": self.out_proj.lora_B @ self.out_proj.lora_A * self.scale,
        }

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Both pairs of factors."""
        return {
            "in_proj_weight": (self.lora_A, self.lora_B * self.scale),
            "out_proj.weight": (self.out_proj.lora_A, self.out_proj.lora_B * self.scale),
        }


_LAYERS: dict[type, Callable[..., AdapterLayer]] = {
    Linear: LinearLayer,
    Embedding: EmbeddingLayer,
    Conv1d: ConvLayer,
    Conv2d: ConvLayer,
    Conv3d: ConvLayer,
    MultiheadAttention: AttentionLayer,
}


def layer_for(module: Module) -> Callable[..., AdapterLayer] | None:
    """The kind of layer for a module, or None where LoRA has none."""
    if is_conv1d(module):
        return LinearLayer
    return next((_LAYERS[c] for c in class_of(module).__mro__ if c in _LAYERS), None)
