"""Prefix tuning: trained keys and values before the text's in every layer (Li and Liang, arXiv 2101.00190, 4).

It deviates from the paper in that an encoder-decoder has a prefix in its decoder's self-attention alone, as in
Hugging Face PEFT, and that without ``prefix_projection`` the prefix starts at random instead of from words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems, refuse_unknown
from lightning_peft.methods.attention_prefix import (
    AttentionStack,
    PrefixedAttention,
    PrefixReader,
    find_attention,
    position_layers,
)
from lightning_peft.methods.virtual_tokens import number_problem

_DESCRIBED = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "init_weights")
_NETWORK = ("embedding", "hidden_weight", "hidden_bias", "output_weight", "output_bias")


@dataclass
class PrefixTuning:
    """Trains what every self-attention reads before the text: ``softmax(q [P_k; K]^T) [P_v; V]``.

    ``P: (n, layers, 2, heads, head_dim)``, with the heads of the keys; every token sees it, the text's positions begin
    behind it. It starts at random, so the model does not start as the base. In an encoder-decoder the decoder has it,
    layer l that of layer 2 l modulo the number of layers, which is how PEFT reads its files.

    Args:
        num_virtual_tokens: length n of the prefix, 1 to 1000. It counts against the model's positions.
        prefix_projection: train ``P = W2 tanh(W1 E + b1) + b2`` with ``E: (n, heads * head_dim)`` instead of P itself,
            as the paper does: steadier, at many times the parameters; a file for others holds P alone.
        encoder_hidden_size: width of that network; None takes ``heads * head_dim``.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW without the projection; a network wants smaller steps the wider it is, 5e-3 at 64.

    Raises:
        ValueError: if a number is out of its range, or a width is given without a network.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        width = self.encoder_hidden_size
        raise_problems(
            "PrefixTuning",
            [
                *range_problems(self, counts=["encoder_hidden_size"], positive=["learning_rate"]),
                number_problem(self.num_virtual_tokens),
                "encoder_hidden_size is the width of a network that only prefix_projection=True has"
                if width is not None and not self.prefix_projection
                else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """The prefix on the module that reads the text, and a layer for each of its self-attention modules.

        Args:
            model: the root, or something with exactly one language model in it.

        Raises:
            ValueError: if there is no language model or several, or its attention has no place for a prefix.
        """
        stack = find_attention("PrefixTuning", model)
        reader = model.get_submodule(stack.reader)
        table = _Prefix(self, stack, reader)
        count = len(stack.names)
        slots = [2 * layer % count if stack.beside_encoder else layer for layer in range(count)]
        attention = {
            name: _PrefixedLayer(table, slot, model.get_submodule(name))
            for name, slot in zip(stack.names, slots, strict=True)
        }
        shifted = position_layers(reader, stack.reader, self.num_virtual_tokens)
        return Placement({stack.reader: table, **attention, **shifted})

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``, the sizes of keys included, which PEFT would guess."""
        stack = find_attention("PrefixTuning", model)
        width = stack.heads * stack.head_dim
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size or width,
            "token_dim": width,
            "num_attention_heads": stack.heads,
            "num_layers": len(stack.names),
            "num_transformer_submodules": 2 if stack.beside_encoder else 1,
        }

    def peft_name(self, key: str, model: Module) -> str:
        """The prefix stands bare in a PEFT file; the network, which it does not read, under a name of its own."""
        return "prompt_embeddings" if key.endswith("prompt_embeddings") else f"base_model.{key}"

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, and with a network the prefix that it gives, which is all that PEFT reads."""
        if not self.prefix_projection:
            return tensors
        place = next(k for k in tensors if k.endswith("output_weight")).removesuffix("output_weight")
        with torch.no_grad():
            return {**tensors, f"{place}prompt_embeddings": project(*(tensors[f"{place}{n}"] for n in _NETWORK))}

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, with a network without the prefix."""
        if not self.prefix_projection:
            return stored
        return {k: t for k, t in stored.items() if not k.endswith("prompt_embeddings")}

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> PrefixTuning:
        """The prefix that an ``adapter_config.json`` describes; PEFT keeps none of the networks.

        Raises:
            ValueError: if it asks for something that is not supported here.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        refuse_unknown("PrefixTuning", config, known=[*names, *_DESCRIBED])
        options = {n: config[n] for n in ("num_virtual_tokens", "modules_to_save") if config.get(n) is not None}
        return cls(**options)


def project(embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``W2 tanh(W1 E + b1) + b2``, the prefix out of the network.

    Args:
        embedding: E, ``(n, d)``.
        w1: ``(m, d)``.
        b1: ``(m,)``.
        w2: ``(out, m)``.
        b2: ``(out,)``.

    Returns:
        ``(n, out)``.
    """
    return F.linear(torch.tanh(F.linear(embedding, w1, b1)), w2, b2)


class _Prefix(PrefixReader):
    """All layers' keys and values: ``prompt_embeddings: (n, layers * 2 * heads * head_dim)``, or the network."""

    def __init__(self, method: PrefixTuning, stack: AttentionStack, reader: Module) -> None:
        n = method.num_virtual_tokens
        super().__init__(n, reader)
        self.heads = stack.heads
        width = stack.heads * stack.head_dim
        total = len(stack.names) * 2 * width
        self.slot = 2 * width
        new: Any = {"dtype": torch.float32, "device": device_for(reader)}
        self.network = method.prefix_projection
        if not self.network:
            self.prompt_embeddings = Parameter(torch.randn(n, total, **new))
            return
        hidden = method.encoder_hidden_size or width
        first, second = Linear(width, hidden, **new), Linear(hidden, total, **new)
        starts = (torch.randn(n, width, **new), first.weight, first.bias, second.weight, second.bias)
        for name, start in zip(_NETWORK, starts, strict=True):
            self.register_parameter(name, Parameter(start.detach()))

    def keys_values(self, slot: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, ``(heads, n, head_dim)`` each."""
        columns = slice(slot * self.slot, (slot + 1) * self.slot)
        if self.network:
            embedding, w1, b1, w2, b2 = (self.get_parameter(n) for n in _NETWORK)
            # outside autocast: the network is small, and in 16 bits its prefix would be
            with torch.autocast(embedding.device.type, enabled=False):
                flat = project(embedding, w1, b1, w2[columns], b2[columns])
        else:
            flat = self.prompt_embeddings[:, columns]
        keys, values = flat.view(self.n, 2, self.heads, -1).permute(1, 2, 0, 3)
        return keys, values


class _PrefixedLayer(PrefixedAttention):
    def __init__(self, table: _Prefix, slot: int, module: Module) -> None:
        super().__init__("PrefixTuning", module)
        self.table = (table,)  # a tuple, so that the prefix is not registered in every layer
        self.slot = slot

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.table[0].keys_values(self.slot)
