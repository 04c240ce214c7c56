"""Bottleneck adapters: small networks in each block, ``h + s up(act(down(h)))``.

After attention and feed-forward: Houlsby et al., arXiv 1902.00751; after the feed-forward only: Pfeiffer et al.,
arXiv 2005.00247; beside the block instead of after it: He et al., arXiv 2110.04366, 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of, layer_number, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.problems import nearest, raise_problems

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class _Block(NamedTuple):
    """Where a known architecture has one of its blocks."""

    after: str  # the module whose output a sequential adapter takes, as a regular expression
    around: str  # the module that a parallel adapter runs beside
    residual: bool  # whether `around` takes the block's input as its second argument and adds it itself


_ATTENTION = (
    _Block(r"(?:.*\.)?attention\.output\.dense", r"(?:.*\.)?attention\.output", residual=True),  # BERT, RoBERTa
    _Block(r"(?:.*\.)?h\.\d+\.attn", r"(?:.*\.)?h\.\d+\.attn", residual=False),  # GPT-2
    _Block(r"(?:.*\.)?layers\.\d+\.self_attn", r"(?:.*\.)?layers\.\d+\.self_attn", residual=False),  # Llama-like
    _Block(r"(?:.*\.)?SelfAttention", r"(?:.*\.)?SelfAttention", residual=False),  # T5
)
_FEED_FORWARD = (
    _Block(r"(?:.*\.)?layer\.\d+\.output\.dense", r"(?:.*\.)?layer\.\d+\.output", residual=True),
    _Block(r"(?:.*\.)?h\.\d+\.mlp", r"(?:.*\.)?h\.\d+\.mlp", residual=False),
    _Block(r"(?:.*\.)?layers\.\d+\.mlp", r"(?:.*\.)?layers\.\d+\.mlp", residual=False),
    _Block(r"(?:.*\.)?DenseReluDense", r"(?:.*\.)?DenseReluDense", residual=False),
)


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
        is_parallel: run beside the block, on its input, instead of on its output.
        scaling: the factor ``s``; the parallel form was proposed with 4.
        dropout: share of the bottleneck's values dropped in training, from 0 up to but not including 1.
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
    reduction_factor: float = 16
    non_linearity: str = "relu"
    is_parallel: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    attention_modules: list[str] | str | None = None
    feed_forward_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 6e-3

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        unknown = self.non_linearity not in _ACTIVATIONS
        raise_problems(
            "BottleneckAdapter",
            [
                None if self.mh_adapter or self.output_adapter else "choose mh_adapter, output_adapter or both",
                f"reduction_factor must be above 0, but got {self.reduction_factor}"
                if self.reduction_factor <= 0
                else None,
                f"non_linearity {self.non_linearity!r} is unknown{nearest(self.non_linearity, _ACTIVATIONS)}"
                if unknown
                else None,
                f"dropout must be at least 0 and below 1, but got {self.dropout}"
                if not 0 <= self.dropout < 1
                else None,
                f"learning_rate must be above 0, but got {self.learning_rate}" if self.learning_rate <= 0 else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """A bottleneck for each chosen block.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if a chosen kind of block is neither known nor named.
        """
        layers: dict[str, AdapterLayer] = {}
        for chosen, named, known, option in (
            (self.mh_adapter, self.attention_modules, _ATTENTION, "attention_modules"),
            (self.output_adapter, self.feed_forward_modules, _FEED_FORWARD, "feed_forward_modules"),
        ):
            if chosen:
                layers |= self._layers(model, named, known, option)
        return Placement(layers)

    def _layers(
        self, model: Module, named: list[str] | str | None, known: Sequence[_Block], option: str
    ) -> dict[str, AdapterLayer]:
        blocks: dict[str, bool] = {}
        if named is not None:
            blocks = dict.fromkeys(match_modules(model, named, layers=self.layers_to_transform, option=option), False)
        else:
            for block in known:
                expression = re.compile(block.around if self.is_parallel else block.after)
                blocks |= {n: block.residual for n in base_modules(model) if expression.fullmatch(n)}
            if not blocks:
                raise ValueError(
                    f"BottleneckAdapter does not know the blocks of {class_of(model).__name__}; "
                    f"name them in {option}, for instance {option}=['self_attn']"
                )
            if self.layers_to_transform is not None:
                wanted = match_modules(model, list(blocks), layers=self.layers_to_transform, option=option)
                blocks = {n: blocks[n] for n in wanted}
        return {
            name: _Bottleneck(self, model.get_submodule(name), _hidden_size(model, name), residual and self.is_parallel)
            for name, residual in blocks.items()
        }


def _hidden_size(model: Module, name: str) -> int:
    """The width of the hidden state at a block: what the block says, or that of its layer's widest norm."""
    modules = base_modules(model)
    for key in ("out_features", "nf", "embed_dim", "hidden_size"):
        if isinstance(getattr(modules[name], key, None), int):
            return int(getattr(modules[name], key))
    number = layer_number(name)
    layer = f"{number[0]}.{number[1]}.".lstrip(".") if number else ""
    inside = (m for n, m in modules.items() if n.startswith(layer) and not n.startswith(f"{name}."))
    vectors = [m._parameters.get("weight") for m in inside]
    widths = [v.numel() for v in vectors if v is not None and v.dim() == 1]
    if not widths:
        raise ValueError(
            f"BottleneckAdapter cannot tell the width of {name!r}, a {class_of(modules[name]).__name__}; name its "
            "last Linear instead"
        )
    return max(widths)


class _Bottleneck(AdapterLayer):
    """``down``: ``(m, hidden)``, ``up``: ``(hidden, m)`` with ``m = hidden / reduction_factor``, at least 1.

    The block's output, or the first part of it if it is a tuple, is ``(batch, tokens, hidden)``.
    """

    def __init__(self, method: BottleneckAdapter, module: Module, hidden: int, residual: bool) -> None:
        super().__init__()
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
        self.is_parallel = method.is_parallel
        self.residual = residual

    def change(self, h: Tensor) -> Tensor:
        """``s up(act(down(h)))``, ``(..., hidden)`` -> ``(..., hidden)``."""
        z = F.linear(h, self.down_weight.to(h.dtype), self.down_bias.to(h.dtype))
        z = F.dropout(_ACTIVATIONS[self.non_linearity](z), self.p, self.training)
        return F.linear(z, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype)) * self.scaling

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.residual:
            # BERT's output module ends in norm(dense(h) + x): what is added to x is added beside the block
            h, x = args
            return base(h, x + self.change(x))
        output = base(*args, **kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        source = first
        if self.is_parallel:
            source = args[0] if args else kwargs["hidden_states"]
        changed = first + self.change(source)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
