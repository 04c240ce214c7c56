"""LoReFT: hidden states edited in a low-rank subspace at a few positions (Wu et al., arXiv 2404.03592).

``h + R^T (W h + b - R h)`` on the output of chosen layers, R with orthonormal rows. Deviations: W starts at R, so that
the model starts as it is, where the authors' first code draws W at random; R is the orthonormal factor of a free
matrix, made anew in each forward, where theirs is a product of Householder reflections. Their data sets end the last
positions one token before the prompt does and halve every row; here the prompt's last token counts, and only a row with
fewer tokens than positions is halved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.per_forward import PerForward
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.positions import Chosen, FindPositions, parse_positions
from lightning_peft.methods.reader import find_layers, find_reader


@dataclass
class LoReFT:
    """Edits hidden states: ``h + R^T (W h + b - R h)`` with ``R, W: (r, hidden)``, ``b: (r)``, ``R R^T = I``.

    Works on the layers of encoders, decoders, and an encoder-decoder's encoder, which reads the prompt there. While a
    model learns to write, the prompt ends before the first token with a label. In generation only the prompt is edited,
    so what follows costs nothing; without a cache each step takes what it has written for prompt.

    Args:
        r: rank of the edit, from 1 to the hidden size.
        positions: ``"f3+l3"`` for the first 3 and last 3 tokens of the prompt, ``"f3"``, ``"l3"``, or ``"all"`` for
            every token, written ones included.
        share_weights: one edit a layer for both ends (the paper's tied weights), or one for each.
        layers_to_transform: only the layers of these numbers; None edits all.
        dropout: share of an edited hidden state dropped in training, from 0 up to but not including 1.
        layer_modules: the layers of a model whose stack is not found: names, suffixes or an expression.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    r: int = 4
    positions: str = "f3+l3"
    share_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    dropout: float = 0.0
    layer_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 4e-3

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        problem = None
        try:
            parse_positions(self.positions)
        except ValueError as error:
            problem = str(error)
        raise_problems(
            "LoReFT",
            [
                *range_problems(self, counts=["r"], positive=["learning_rate"], shares=["dropout"]),
                problem,
            ],
        )

    def place(self, model: Module) -> Placement:
        """An edit for each chosen layer, and on the model what finds the positions.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if the layers, or the model that reads the text, are not found, or the rank is too large.
        """
        names, hidden = find_layers("LoReFT", model, self.layer_modules, self.layers_to_transform)
        if self.r > hidden:
            raise ValueError(
                f"LoReFT: r={self.r} is above the hidden size {hidden} of {names[0]!r}; lower it to {hidden} or less"
            )
        ends = parse_positions(self.positions)
        if ends is None:
            return Placement({n: _Edit(self, model.get_submodule(n), hidden, 1, None) for n in names})
        reader = find_reader("LoReFT with positions", model)
        finder = FindPositions("LoReFT", reader.module, ends, shared=self.share_weights)
        groups = 1 if self.share_weights or 0 in ends else 2
        edits = {n: _Edit(self, model.get_submodule(n), hidden, groups, finder.chosen) for n in names}
        return Placement({reader.name: finder, **edits})


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """The orthonormal rows that Gram and Schmidt make of a matrix's; ``(..., r, hidden)`` to the same.

    The scale of the matrix does not count, so weight decay leaves them alone.
    """
    q, upper = torch.linalg.qr(matrix.mT)
    # without this a row's sign would be the library's choice, and could change from one step to the next
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    rows: Tensor = (q * signs.unsqueeze(-2)).mT
    return rows


def edit(h: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``R^T (W h + b - R h)``.

    Args:
        h: ``(batch, groups, k, hidden)``.
        r: R, ``(groups, r, hidden)``.
        w: W, of the same shape.
        b: ``(groups, r)``.

    Returns:
        The shape of ``h``.
    """
    # (W - R) h rather than W h - R h: nothing is lost in 16 bits where the two are close, and nothing at all is added
    # where they are equal
    source = h @ (w - r).mT.to(h.dtype) + b.unsqueeze(1).to(h.dtype)
    return source @ r.to(h.dtype)


class _Edit(AdapterLayer):
    """One layer's edits; ``groups`` is 2 where the two ends of a prompt have weights of their own."""

    divisible: ClassVar[bool] = False

    def __init__(
        self, method: LoReFT, module: Module, hidden: int, groups: int, chosen: PerForward[Chosen] | None
    ) -> None:
        super().__init__()
        device = device_for(module)
        start = torch.randn(groups, method.r, hidden, dtype=torch.float32, device=device)
        self.rotation = Parameter(orthonormal_rows(start))
        self.weight = Parameter(orthonormal_rows(self.rotation.detach()))
        self.bias = Parameter(torch.zeros(groups, method.r, dtype=torch.float32, device=device))
        self.chosen = chosen
        self.p = method.dropout

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the layer and edits what it gives, ``(batch, tokens, hidden)``."""
        output = base(*args, **kwargs)
        h: Tensor = output[0] if isinstance(output, tuple) else output
        edited = self._everywhere(h) if self.chosen is None else self._at(h, self._positions(self.chosen, h))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _positions(self, chosen: PerForward[Chosen], h: Tensor) -> Chosen:
        found = chosen.read()
        if found is None:
            raise RuntimeError(
                "LoReFT: a layer ran without the model's forward around it, which says where the prompt's ends are; "
                "call the model, and checkpoint activations with use_reentrant=False and not within one another; "
                "or take positions='all'"
            )
        if found.tokens != h.shape[1]:
            raise RuntimeError(
                f"LoReFT: the model read {found.tokens} tokens a row but its layer gave {h.shape[1]}; another active "
                "adapter puts tokens before the text, and LoReFT must come before it in the order of the active ones"
            )
        return found

    def _at(self, h: Tensor, chosen: Chosen) -> Tensor:
        batch, groups, k = chosen.places.shape
        if k == 0:
            return h
        index = chosen.places.reshape(batch, -1, 1).expand(-1, -1, h.shape[-1])
        there = h.gather(1, index)
        change = self._change(there.view(batch, groups, k, -1)).reshape(there.shape)
        return h.scatter_add(1, index, change * chosen.valid.reshape(batch, -1, 1))

    def _everywhere(self, h: Tensor) -> Tensor:
        return h + self._change(h.unsqueeze(1)).squeeze(1)

    def _change(self, h: Tensor) -> Tensor:
        # outside autocast, which would take these small products to 16 bits where the hidden state itself is not
        with torch.autocast(h.device.type, enabled=False):
            change = edit(h, orthonormal_rows(self.rotation), self.weight, self.bias)
        # the authors drop from the whole edited state
        return F.dropout(h + change, self.p, self.training) - h if self.p and self.training else change
