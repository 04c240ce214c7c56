"""Bottleneck adapters: small networks in each block, ``h + s up(act(down(h)))``.

After attention and feed-forward: Houlsby et al., arXiv 1902.00751; after the feed-forward only: Pfeiffer et al.,
arXiv 2005.00247; beside the block instead of after it: He et al., arXiv 2110.04366, 4; with an invertible adapter at
the embeddings: Pfeiffer et al., arXiv 2005.00052.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.methods.blocks import ACTIVATIONS, BlockLayer, Place, Standing, find_blocks
from lightning_peft.methods.invertible import INVERTIBLE, place_invertible


@dataclass
class BottleneckAdapter:
    """A bottleneck after (or beside) the attention, the feed-forward, or both, of every layer.

    The blocks of BERT, RoBERTa, GPT-2, Llama, Qwen, Mistral and T5 models are found; for others name the modules.
    ``up`` starts at zero, so the model starts as the base.

    Args:
        mh_adapter: adapt the multi-head attention's output.
        output_adapter: adapt the feed-forward's output.
        reduction_factor: hidden size divided by the bottleneck's, above 0; 16 is Houlsby's middle choice.
        non_linearity: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        original_ln_before: read the sum of the block's output and its input, normed where the model norms it, and add
            to the output: Pfeiffer's placement. Named modules are then the norms that take this sum, or the layers
            that give it. Not for the attention of models whose norms come first, other than T5's.
        is_parallel: run beside the block, on its input, instead of on its output.
        scaling: the factor ``s``; the parallel form was proposed with 4.
        dropout: share of the bottleneck's values dropped in training, from 0 up to but not including 1.
        inv_adapter: ``"nice"`` puts MAD-X's coupling block on the input embeddings and its inverse before the output
            embeddings, with the same ``non_linearity``; for language adapters.
        inv_adapter_reduction_factor: half of the embedding's width divided by the width inside that block, above 0.
        attention_modules: the attention blocks of a model that is not known: names, suffixes or an expression.
        feed_forward_modules: the same for its feed-forward blocks.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range, neither block is chosen, or a parallel adapter should
            read what comes behind the block.
    """

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float = 16
    non_linearity: str = "relu"
    original_ln_before: bool = False
    is_parallel: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float = 2
    attention_modules: list[str] | str | None = None
    feed_forward_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 6e-3

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        unknown = self.non_linearity not in ACTIVATIONS
        raise_problems(
            "BottleneckAdapter",
            [
                *range_problems(
                    self,
                    positive=["reduction_factor", "inv_adapter_reduction_factor", "learning_rate"],
                    shares=["dropout"],
                ),
                None if self.mh_adapter or self.output_adapter else "choose mh_adapter, output_adapter or both",
                f"non_linearity {self.non_linearity!r} is unknown{nearest(self.non_linearity, ACTIVATIONS)}"
                if unknown
                else None,
                "original_ln_before is for adapters behind the block; take it or is_parallel, not both"
                if self.original_ln_before and self.is_parallel
                else None,
                f"inv_adapter {self.inv_adapter!r} is unknown{nearest(str(self.inv_adapter), INVERTIBLE)}"
                if self.inv_adapter not in (None, *INVERTIBLE)
                else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """A bottleneck for each chosen block, and the invertible adapter if there is one.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if a chosen kind of block is neither known nor named, or the model has no place for a bottleneck
                behind it or for an invertible adapter.
        """
        places = find_blocks(model, self, self._standing())
        layers: dict[str, AdapterLayer] = {p.name: _Bottleneck(self, model.get_submodule(p.name), p) for p in places}
        if not self.inv_adapter:
            return Placement(layers)
        factor, saved = self.inv_adapter_reduction_factor, self.modules_to_save
        ends = place_invertible("BottleneckAdapter", model, factor, self.non_linearity, saved)
        return Placement(layers | ends)

    def _standing(self) -> Standing:
        if self.is_parallel:
            return "beside"
        return "behind" if self.original_ln_before else "after"


class _Bottleneck(BlockLayer):
    """``down``: ``(m, hidden)``, ``up``: ``(hidden, m)`` with ``m = hidden / reduction_factor``, at least 1."""

    def __init__(self, method: BottleneckAdapter, module: Module, place: Place) -> None:
        super().__init__(place, beside=method.is_parallel)
        hidden = place.hidden
        size = max(1, int(hidden / method.reduction_factor))
        device = device_for(module)
        self.down_weight = Parameter(torch.empty(size, hidden, dtype=torch.float32, device=device))
        self.down_bias = Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.up_weight = Parameter(torch.zeros(hidden, size, dtype=torch.float32, device=device))
        self.up_bias = Parameter(torch.zeros(hidden, dtype=torch.float32, device=device))
        init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        self.non_linearity = method.non_linearity
        self.scaling = method.scaling
        self.p = method.dropout

    def change(self, h: Tensor) -> Tensor:
        """``s up(act(down(h)))``, ``(..., hidden)`` -> ``(..., hidden)``."""
        z = F.linear(h, self.down_weight.to(h.dtype), self.down_bias.to(h.dtype))
        z = F.dropout(ACTIVATIONS[self.non_linearity](z), self.p, self.training)
        return F.linear(z, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype)) * self.scaling
