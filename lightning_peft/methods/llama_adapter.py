"""LLaMA-Adapter: prompts in the upper layers that a gate lets in from zero (Zhang et al., arXiv 2303.16199, 3.2).

It deviates from the paper in that a layer has one gate instead of one a head, as in Hugging Face PEFT, and that GPT-2,
as there, gets what its heads read from the prompt without the output projection.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.base import module_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of, is_conv1d, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems, refuse_unknown

# Whose queries are made as here. Others of like parts skip the rotation in some layers, clip, or norm elsewhere
_ROTARY = frozenset(
    f"{kind}Attention"
    for kind in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Granite")
)
_EXPECTED = "the self-attention of a model of Llama's kind (Mistral, Mixtral, Qwen, Gemma, Granite) or of GPT-2"


@dataclass
class LlamaAdapter:
    """Adds ``W_o g softmax(q K_p^T / sqrt(d)) V_p`` to attention, ``K_p = W_k P``, ``V_p = W_v P``.

    ``P: (1, len, hidden)`` goes through the layer's own projections and has no position; q is the query that the text
    is read with. The gate ``g: (1,)`` starts at zero, so the model starts as the base.

    Args:
        adapter_len: length of P, 1 or more; 10 as in the paper.
        adapter_layers: how many layers, from the top; None takes all (the paper leaves out the lowest 2 of 32).
        target_modules: the attention modules' own name, such as ``"self_attn"``; None finds them.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; the paper's, large since at first only the gates move.

    Raises:
        ValueError: if a number is out of its range.
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    target_modules: str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 9e-3

    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        problems = range_problems(self, counts=["adapter_len", "adapter_layers"], positive=["learning_rate"])
        raise_problems("LlamaAdapter", problems)

    def place(self, model: Module) -> Placement:
        """A layer for the attention modules of the upper layers.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if there is no attention of a known kind, or there are fewer layers than are asked for.
        """
        names = self._attention(model)
        if self.adapter_layers is not None:
            if self.adapter_layers > len(names):
                raise ValueError(
                    f"LlamaAdapter: adapter_layers={self.adapter_layers}, but {class_of(model).__name__} has "
                    f"{len(names)} attention modules"
                )
            names = names[-self.adapter_layers :]
        return Placement({n: self._layer(model.get_submodule(n)) for n in names})

    def _attention(self, model: Module) -> list[str]:
        if self.target_modules is not None:
            named = [self.target_modules]
            return match_modules(model, named, suits=lambda m: _kind_of(m) is not None, kinds=_EXPECTED)
        found = [n for n, m in base_modules(model).items() if _kind_of(m) is not None]
        if not found:
            raise ValueError(
                f"LlamaAdapter needs {_EXPECTED}, but {class_of(model).__name__} has none; "
                "PrefixTuning knows more models"
            )
        return found

    def _layer(self, module: Module) -> AdapterLayer:
        kind = _kind_of(module)
        assert kind is not None
        return kind(self.adapter_len, module)

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``."""
        name = self.target_modules or placed[0].rpartition(".")[2]
        return {"adapter_len": self.adapter_len, "adapter_layers": len(placed), "target_modules": name}

    def peft_name(self, key: str, model: Module) -> str:
        """The name of a tensor in a PEFT file: its own behind ``base_model.model.``."""
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> LlamaAdapter:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for something that is not supported here.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        refuse_unknown("LlamaAdapter", config, known=names)
        return cls(**{n: config[n] for n in names if config.get(n) is not None})


def gated_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """``g softmax(scale q k^T) v``, what the heads read from the prompt.

    Args:
        q: ``(batch, heads, tokens, d)``.
        k: ``(1, key heads, len, d)``; each serves a group of the query's heads.
        v: as k.
        gate: g, ``(1,)``.
        scale: usually ``1 / sqrt(d)``.

    Returns:
        ``(batch, tokens, heads * d)``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3).to(q.dtype) * scale
    # 16-bit sums of exponentials would be coarse
    weights = F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (gate.to(v.dtype) * weights @ v).transpose(1, 2).flatten(2)


class _GatedPrompt(AdapterLayer):
    """``adaption_prompt``: P, ``(1, len, hidden)``, and ``adaption_gate``: g, ``(1,)``."""

    def __init__(self, length: int, module: Module, hidden: int) -> None:
        super().__init__()
        device = device_for(module)
        self.names = list(inspect.signature(module.forward).parameters)
        self.adaption_prompt = Parameter(torch.randn(1, length, hidden, dtype=torch.float32, device=device))
        self.adaption_gate = Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def change(self, module: Any, h: Tensor, values: dict[str, Any]) -> Tensor:
        """What is added to the attention's output; h: ``(batch, tokens, hidden)`` -> the same."""
        raise NotImplementedError(f"{type(self).__name__} must define change(module, h, values)")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.names, args, strict=False)) | kwargs
        output, *rest = base(*args, **kwargs)
        added = self.change(module_of(base), values[self.names[0]], values)
        return (output + added.to(output.dtype), *rest)


class _Rotary(_GatedPrompt):
    """Attention of Llama's kind: projections of their own, queries turned by their position, perhaps normed."""

    def __init__(self, length: int, module: Any) -> None:
        super().__init__(length, module, module.k_proj.in_features)
        self.rotate = _rotation(module)

    @staticmethod
    def suits(module: Any) -> bool:
        takes_angles = "position_embeddings" in inspect.signature(module.forward).parameters
        return class_of(module).__name__ in _ROTARY and takes_angles and _rotation(module) is not None

    def change(self, module: Any, h: Tensor, values: dict[str, Any]) -> Tensor:
        cos, sin = values["position_embeddings"]
        q = self._heads(module.q_proj(h), module, "q_norm")
        q, _ = self.rotate(q, q, cos, sin)
        prompt = self.adaption_prompt.to(h.dtype)
        k = self._heads(module.k_proj(prompt), module, "k_norm")
        v = self._heads(module.v_proj(prompt), module)
        read: Tensor = module.o_proj(gated_attention(q, k, v, self.adaption_gate, module.scaling))
        # attention itself has added the bias
        return read if module.o_proj.bias is None else read - module.o_proj.bias

    def _heads(self, x: Tensor, module: Any, norm: str | None = None) -> Tensor:
        """``(batch, tokens, heads * d)`` -> ``(batch, heads, tokens, d)``."""
        split = x.view(*x.shape[:-1], -1, module.head_dim)
        own: Module | None = module._modules.get(norm)  # Qwen3's
        normed: Tensor = split if own is None else own(split)
        return normed.transpose(1, 2)


class _Fused(_GatedPrompt):
    """Attention of GPT-2: one projection for queries, keys and values."""

    def __init__(self, length: int, module: Any) -> None:
        super().__init__(length, module, module.embed_dim)

    @staticmethod
    def suits(module: Any) -> bool:
        parts = module._modules
        fused = parts.get("c_attn")
        return fused is not None and is_conv1d(fused) and getattr(module, "is_cross_attention", None) is False

    def change(self, module: Any, h: Tensor, values: dict[str, Any]) -> Tensor:
        q, _, _ = self._projected(module, h)
        _, k, v = self._projected(module, self.adaption_prompt.to(h.dtype))
        return gated_attention(q, k, v, self.adaption_gate, module.scaling)

    def _projected(self, module: Any, x: Tensor) -> list[Tensor]:
        parts = module.c_attn(x).split(module.split_size, -1)
        return [part.reshape(*part.shape[:-1], -1, module.head_dim).transpose(1, 2) for part in parts]


def _rotation(module: Module) -> Any:
    """The function with which the model's own code turns queries, for its way of pairing features."""
    return getattr(sys.modules[class_of(module).__module__], "apply_rotary_pos_emb", None)


def _kind_of(module: Module) -> type[_Rotary] | type[_Fused] | None:
    return next((kind for kind in (_Rotary, _Fused) if kind.suits(module)), None)
