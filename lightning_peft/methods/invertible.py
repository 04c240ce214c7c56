"""Invertible adapters at both ends of a language model (MAD-X: Pfeiffer et al., arXiv 2005.00052, 3.3).

A coupling block (NICE: Dinh et al., arXiv 1410.8516) changes the input embeddings, and its exact inverse, with the same
parameters, stands before the output embeddings; a model without those, such as a classifier, has the first alone.

The block stands on the module that embeds the tokens, before positions are added, so that both ends are in the space of
the tokens' embeddings; AdapterHub's ``adapters`` puts it behind BERT's sum of embeddings and its norm. In
encoder-decoders one block serves both sides, where AdapterHub's changes the encoder's embeddings only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter, init
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of, is_within, match_modules
from lightning_peft.core.problems import an
from lightning_peft.methods.blocks import ACTIVATIONS
from lightning_peft.methods.linear import is_linear, sizes
from lightning_peft.methods.reader import find_reader, input_embedding

INVERTIBLE = ("nice",)


def couple(x: Tensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]) -> Tensor:
    """``[y1, y2]`` of ``x = [x1, x2]`` with ``y1 = x1 + f(x2)`` and ``y2 = x2 + g(y1)``.

    Args:
        x: ``(..., hidden)``; the first half has ``hidden // 2`` values.
        f: from the second half to the first, any function.
        g: from the first half to the second, any function.

    Returns:
        ``(..., hidden)``.
    """
    x1, x2 = _halves(x)
    y1 = x1 + f(x2)
    return torch.cat([y1, x2 + g(y1)], -1)


def uncouple(y: Tensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]) -> Tensor:
    """The x of which `couple` made y: ``x2 = y2 - g(y1)`` and ``x1 = y1 - f(x2)``.

    Args:
        y: ``(..., hidden)``.
        f: as for `couple`.
        g: as for `couple`.

    Returns:
        ``(..., hidden)``.
    """
    y1, y2 = _halves(y)
    x2 = y2 - g(y1)
    return torch.cat([y1 - f(x2), x2], -1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first = x.shape[-1] // 2
    return x[..., :first], x[..., first:]


def place_invertible(
    method: str, model: Module, reduction_factor: float, non_linearity: str, saved: Sequence[str] | str | None
) -> dict[str, AdapterLayer]:
    """The coupling block on the input embeddings, and its inverse before the output embeddings where there are such.

    Args:
        method: its name, for errors.
        model: the root, or something with exactly one language model in it.
        reduction_factor: half of the embedding's width divided by the width inside f and g.
        non_linearity: one of `ACTIVATIONS`.
        saved: the method's ``modules_to_save``.

    Raises:
        ValueError: if there is no language model or several, if the output embeddings are of another width than the
            input's, or if either trains in full.
    """
    host = find_reader(method, model).host
    names = {id(m): n for n, m in base_modules(model).items()}
    sides = [host.get_encoder(), host.get_decoder()] if getattr(host.config, "is_encoder_decoder", False) else [host]
    found = {names[id(e)]: e for e in map(input_embedding, sides) if e is not None}
    (name, embedding), *others = found.items()
    block = _Coupling(embedding, reduction_factor, non_linearity)
    layers: dict[str, AdapterLayer] = {name: block, **{n: _Same(block) for n, _ in others}}
    head = host.get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
    if isinstance(head, Module):
        _refuse_width(method, names[id(head)], head, embedding)
        layers[names[id(head)]] = _Inverse(block)
    if saved:
        taken = match_modules(model, saved, option="modules_to_save")
        for n in layers:
            if is_within(n, taken):
                raise ValueError(
                    f"{method}: modules_to_save names {n!r}, where the invertible adapter stands, so it would be left "
                    "out; take it out of modules_to_save, or choose inv_adapter=None"
                )
    return layers


def _refuse_width(method: str, name: str, head: Module, embedding: Embedding) -> None:
    width = sizes(head)[0] if is_linear(head) else None
    if width != embedding.embedding_dim:
        raise ValueError(
            f"{method}: the inverse of an adapter of the {embedding.embedding_dim}-wide input embeddings does not fit "
            f"{name!r}, {an(class_of(head).__name__)} of width {width}; choose inv_adapter=None"
        )


class _Coupling(AdapterLayer):
    """Embeds and couples; f and g are ``up(act(down(.)))``.

    With ``a`` and ``b`` the widths of the halves, ``f_down: (b / reduction_factor, b)``, ``f_up: (a, b /
    reduction_factor)``, and g's the other way round. ``up`` starts at zero, so both directions start as nothing.
    """

    def __init__(self, embedding: Embedding, reduction_factor: float, non_linearity: str) -> None:
        super().__init__()
        a = embedding.embedding_dim // 2
        b = embedding.embedding_dim - a
        self.non_linearity = non_linearity
        for name, n_in, n_out in (("f", b, a), ("g", a, b)):
            inner = max(1, int(n_in / reduction_factor))
            self._add_linear(f"{name}_down", n_in, inner, device_for(embedding))
            self._add_linear(f"{name}_up", inner, n_out, device_for(embedding))
            init.zeros_(self.get_parameter(f"{name}_up_weight"))

    def _add_linear(self, name: str, n_in: int, n_out: int, device: torch.device) -> None:
        weight = torch.empty(n_out, n_in, dtype=torch.float32, device=device)
        init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.register_parameter(f"{name}_weight", Parameter(weight))
        self.register_parameter(f"{name}_bias", Parameter(torch.zeros(n_out, dtype=torch.float32, device=device)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        # on a model spread over devices the output embeddings may lie elsewhere
        return F.linear(x, *(self.get_parameter(f"{name}_{part}").to(x) for part in ("weight", "bias")))

    def f(self, x: Tensor) -> Tensor:
        """From the second half to the first."""
        return self._linear("f_up", ACTIVATIONS[self.non_linearity](self._linear("f_down", x)))

    def g(self, x: Tensor) -> Tensor:
        """From the first half to the second."""
        return self._linear("g_up", ACTIVATIONS[self.non_linearity](self._linear("g_down", x)))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return couple(base(*args, **kwargs), self.f, self.g)


class _Same(AdapterLayer):
    """The same block on another module that embeds tokens."""

    def __init__(self, block: _Coupling) -> None:
        super().__init__()
        self.block = (block,)  # a tuple, so that its parameters are registered once

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.block[0](base, *args, **kwargs)  # type: ignore[no-any-return]


class _Inverse(AdapterLayer):
    """The block's inverse before the output embeddings."""

    def __init__(self, block: _Coupling) -> None:
        super().__init__()
        self.block = (block,)

    def forward(self, base: Callable[..., Any], x: Tensor) -> Any:
        (block,) = self.block
        return base(uncouple(x, block.f, block.g))
