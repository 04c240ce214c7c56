"""The blocks that adapter layers stand in, attention and feed-forward, and how a layer joins one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import LayerNorm, Module, RMSNorm
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, class_of, is_within, layer_number, match_modules
from lightning_peft.core.problems import an

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
    behind: str | None  # the norm beside `after` that takes the sum with the input; "": the parent gives it


_ATTENTION = (
    _Block(r"(?:.*\.)?attention\.output\.dropout", r"(?:.*\.)?attention\.output", True, "LayerNorm"),  # BERT, RoBERTa
    _Block(r"(?:.*\.)?h\.\d+\.attn", r"(?:.*\.)?h\.\d+\.attn", False, None),  # GPT-2
    _Block(r"(?:.*\.)?layers\.\d+\.self_attn", r"(?:.*\.)?layers\.\d+\.self_attn", False, None),  # Llama-like
    _Block(r"(?:.*\.)?SelfAttention", r"(?:.*\.)?SelfAttention", False, ""),  # T5
)
_FEED_FORWARD = (
    _Block(r"(?:.*\.)?layer\.\d+\.output\.dropout", r"(?:.*\.)?layer\.\d+\.output", True, "LayerNorm"),
    _Block(r"(?:.*\.)?h\.\d+\.mlp", r"(?:.*\.)?h\.\d+\.mlp", False, ""),
    _Block(r"(?:.*\.)?layers\.\d+\.mlp", r"(?:.*\.)?layers\.\d+\.mlp", False, ""),
    _Block(r"(?:.*\.)?DenseReluDense", r"(?:.*\.)?DenseReluDense", False, ""),
)

Standing = Literal["after", "beside", "behind"]


class BlockOptions(Protocol):
    """The options that say which blocks a method's layers stand in."""

    mh_adapter: bool
    output_adapter: bool
    attention_modules: list[str] | str | None
    feed_forward_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None


class Place(NamedTuple):
    """A block that gets a layer.

    Attributes:
        name: the module to adapt.
        hidden: the width of the hidden state.
        residual: whether the module takes the block's input as its second argument and adds it itself.
        norm: whether the module is the norm that takes the block and its input added.
    """

    name: str
    hidden: int
    residual: bool
    norm: bool


def find_blocks(model: Module, method: BlockOptions, standing: Standing = "after") -> Iterator[Place]:
    """The chosen blocks of a model, those of known architectures or those that the user names.

    Args:
        model: the root.
        method: which blocks are chosen.
        standing: whether the layers take a block's output, run beside the block, or take the sum of its output and
            its input.

    Raises:
        ValueError: if a chosen kind of block is neither known nor named, or its sum is no module's.
    """
    modules = base_modules(model)
    for switch, named, known, option in (
        ("mh_adapter", method.attention_modules, _ATTENTION, "attention_modules"),
        ("output_adapter", method.feed_forward_modules, _FEED_FORWARD, "feed_forward_modules"),
    ):
        if not getattr(method, switch):
            continue
        blocks: dict[str, bool] = {}
        if named is not None:
            blocks = dict.fromkeys(match_modules(model, named, layers=method.layers_to_transform, option=option), False)
        else:
            for block in known:
                expression = re.compile(block.around if standing == "beside" else block.after)
                found = [n for n in modules if expression.fullmatch(n)]
                if standing == "behind" and found:
                    found = [_behind(n, block.behind, option, switch) for n in found]
                blocks |= dict.fromkeys(found, block.residual)
            if not blocks:
                raise ValueError(_unknown_blocks(model, type(method).__name__, option, switch))
            if method.layers_to_transform is not None:
                wanted = match_modules(model, list(blocks), layers=method.layers_to_transform, option=option)
                blocks = {n: blocks[n] for n in wanted}
        for name, residual in blocks.items():
            hidden = hidden_size(type(method).__name__, model, name)
            norm = standing == "behind" and isinstance(modules[name], LayerNorm | RMSNorm)
            yield Place(name, hidden, residual and standing == "beside", norm)


def _behind(name: str, behind: str | None, option: str, switch: str) -> str:
    """The module that has a block's sum with its input."""
    if behind is None:
        raise ValueError(
            f"original_ln_before: no module takes or gives the sum of {name!r} and its input; choose {switch}=False, "
            f"or name other modules in {option}"
        )
    parent = name.rpartition(".")[0]
    return f"{parent}.{behind}" if behind else parent


def _unknown_blocks(model: Module, method: str, option: str, switch: str) -> str:
    """What to do about a model whose blocks of one kind are not known, with the names of its modules."""
    kind = option.removesuffix("_modules").replace("_", "-")
    names = [n for n in base_modules(model) if n]
    # what every layer has counts once, under the name behind the layer's number
    inside = [re.sub(r"^(?:.*\.)?\d+(?:\.|$)", "", n) for n in names if layer_number(n) is not None]
    ends = list(dict.fromkeys(e for e in inside if e)) or names
    shown = ", ".join(ends[:12]) + (", ..." if len(ends) > 12 else "")
    return (
        f"{method} does not know the {kind} blocks of {class_of(model).__name__}; name them in {option} (its modules: "
        f"{shown}), or leave them without a layer by {switch}=False"
    )


def hidden_size(method: str, model: Module, name: str) -> int:
    """The width of the hidden state at a block: what the block says, or that of its layer's widest norm.

    Args:
        method: its name, for errors.
        model: the root.
        name: the block, or the layer.

    Raises:
        ValueError: if neither tells.
    """
    modules = base_modules(model)
    for key in ("out_features", "nf", "embed_dim", "hidden_size"):
        if isinstance(getattr(modules[name], key, None), int):
            return int(getattr(modules[name], key))
    number = layer_number(name)
    layer = f"{number[0]}.{number[1]}".lstrip(".") if number else ""
    around = (n for n in modules if is_within(n, [layer]) or not layer)
    inside = (modules[n] for n in around if n == name or name == layer or not is_within(n, [name]))
    vectors = [m._parameters.get("weight") for m in inside]
    widths = [v.numel() for v in vectors if v is not None and v.dim() == 1]
    if not widths:
        raise ValueError(
            f"{method} cannot tell the width of {name!r}, {an(class_of(modules[name]).__name__)}; name its "
            "last Linear instead"
        )
    return max(widths)


class BlockLayer(AdapterLayer):
    """``h + change(h)`` on a block's output, or beside the block on its input; ``(batch, tokens, hidden)``.

    A block that gives a tuple has its hidden state first.

    Args:
        place: where it stands.
        beside: whether the change is made of the block's input.
    """

    def __init__(self, place: Place, *, beside: bool = False) -> None:
        super().__init__()
        self.is_parallel = beside
        self.residual = place.residual
        self.norm = place.norm

    def change(self, h: Tensor) -> Tensor:
        """What is added, ``(..., hidden)`` -> ``(..., hidden)``."""
        raise NotImplementedError(f"{type(self).__name__} must define change(h)")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the block and adds the change."""
        if self.residual:
            # BERT's output module ends in norm(dense(h) + x): what is added to x is added beside the block
            h, x = args
            return base(h, x + self.change(x))
        if self.norm:  # the change is made of the normed sum, and added to the sum before it is normed again
            (x,) = args
            return base(x + self.change(base(x)))
        output = base(*args, **kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        source = first
        if self.is_parallel:
            source = args[0] if args else kwargs["hidden_states"]
        changed = first + self.change(source)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
