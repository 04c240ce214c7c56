"""Ladder side tuning: a small network beside the frozen one, fed by its layers (Sung et al., arXiv 2206.06522, 3).

With ``h_l`` the backbone's hidden state after its layer l and ``h_0`` before the first:

    mu_l = sigmoid(alpha_l / T),   s_0 = D_0 h_0,   z_l = mu_l D_l h_l + (1 - mu_l) s_{l-1}
    s_l = z_l + W2_l gelu(W1_l norm(z_l));   h_L + U norm(s_L) goes on to the backbone's last norm and its head

The backbone's layers run without autograd: nothing of theirs is kept for a backward pass, and none goes through them.

What deviates from the paper: its side layers are whole transformer layers cut out of the backbone by Fisher
importance; these here are their feed-forward half, freshly made. Tokens meet in the backbone, and without attention of
its own the side network needs no mask and no cache, so causality, padding and cached generation are the backbone's to
the bit, and it fits every architecture. The paper's head reads ``U norm(s_L)`` alone; here it is added to ``h_L`` and
``U`` starts at zero, so the model starts as the base.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn import functional as F

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import class_of, is_within, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.blocks import hidden_size
from lightning_peft.methods.reader import Layers, find_layers

_STATES = "_ladder_side_states"
_EXPANSION = 4  # inner width of a transformer's feed-forward


@dataclass(kw_only=True)
class LadderSideTuning:
    r"""A narrow residual network beside the stack of layers; the backbone runs without autograd.

    The layers of transformers' models are found, and of models that have one list of modules; for others name them. In
    encoder-decoders the ladder stands beside the decoder: what it adds to an encoder could reach the loss
    only through the decoder's layers, which pass no gradient.

    Args:
        reduction_factor: hidden size divided by the side network's width, above 0; 8 as in the paper.
        temperature: T of the gates, above 0; 0.1 as in the paper. The gates start at one half.
        dropout: share of each side layer's output dropped in training, from 0 up to but not including 1.
        layer_modules: the layers of a model that is not known, all of one stack and in the order in which they run:
            names, suffixes or an expression such as ``r"blocks\.\d+"``.
        layers_to_transform: only the layers of these numbers get a rung; past the others the side state goes on as it
            is (the paper drops side layers at equal distances).
        modules_to_save: modules that train in full, as copies that the adapter owns, such as the head.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number is out of its range.
    """

    reduction_factor: float = 8
    temperature: float = 0.1
    dropout: float = 0.0
    layer_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "LadderSideTuning",
            range_problems(self, positive=["reduction_factor", "temperature", "learning_rate"], shares=["dropout"]),
        )

    def place(self, model: Module) -> Placement:
        """A rung for each layer of the stack, with the way in at the first and the way out at the last.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if the layers are not known or not of one stack and one width, or if ``modules_to_save`` names
                something inside them.
        """
        stack, width = self._stack(model)
        self._refuse_saved_inside(model, stack)
        chosen = set(stack)
        if self.layers_to_transform is not None:
            chosen &= set(match_modules(model, stack, layers=self.layers_to_transform, option="layer_modules"))
        ladder = _Ladder(self, width)
        layers: dict[str, AdapterLayer] = {}
        for n in stack:
            ends = {"first": n == stack[0], "last": n == stack[-1]}
            layers[n] = _Rung(ladder, n, device_for(model.get_submodule(n)), n in chosen, **ends)
        return Placement(layers)

    def _stack(self, model: Module) -> Layers:
        """The layers in their order; those that the user names have to be of one stack and one width."""
        layers = find_layers("LadderSideTuning", model, self.layer_modules, decoder=True)
        parents = sorted({n.rpartition(".")[0] for n in layers.names})
        if len(parents) > 1:
            raise ValueError(
                f"LadderSideTuning stands beside one stack of layers, but {class_of(model).__name__} has {parents}; "
                rf"name the layers of one, such as layer_modules=r'{re.escape(parents[-1])}\.\d+'"
            )
        if self.layer_modules is not None:
            widths: dict[str, int | tuple[int, int]] = {}
            for n in layers.names:
                taken, given = _width_in(model.get_submodule(n)), hidden_size("LadderSideTuning", model, n)
                widths[n] = given if taken in (None, given) else (taken or 0, given)
            if len(set(widths.values())) > 1 or any(isinstance(w, tuple) for w in widths.values()):
                raise ValueError(
                    f"LadderSideTuning needs layers of one width, but got {widths}; name such in layer_modules"
                )
        return layers

    def _refuse_saved_inside(self, model: Module, stack: list[str]) -> None:
        if not self.modules_to_save:
            return
        for saved in match_modules(model, self.modules_to_save, option="modules_to_save"):
            if is_within(saved, stack) or any(is_within(n, [saved]) for n in stack):
                raise ValueError(
                    f"LadderSideTuning: modules_to_save names {saved!r}, but the backbone's layers ({stack[0]} to "
                    f"{stack[-1]}) run without autograd, so nothing in them trains; name modules outside them"
                )


class _Ladder:
    """What the rungs of one ladder share: their options, and by which key they know their state."""

    def __init__(self, method: LadderSideTuning, hidden: int) -> None:
        self.hidden = hidden
        self.width = max(1, int(hidden / method.reduction_factor))
        self.temperature = method.temperature
        self.dropout = method.dropout


class _Rung(AdapterLayer):
    """One layer's part of the side network, of width ``m = hidden / reduction_factor``, at least 1.

    ``down: (m, hidden)``, ``alpha: (1,)``, ``norm: (m,)``, ``inner: (4 m, m)``, ``outer: (m, 4 m)``; at the first layer
    also ``first: (m, hidden)``, which is D_0, and at the last ``final_norm: (m,)`` and ``up: (hidden, m)``.

    The side state travels on the hidden state itself, as an attribute of the tensor: so each forward has its own,
    whatever other threads do, it is gone with the tensor, and a layer that activation checkpointing runs again finds
    the state that it had.
    """

    divisible: ClassVar[bool] = False

    def __init__(
        self, ladder: _Ladder, place: str, device: torch.device, mixes: bool, *, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.ladder, self.place = ladder, place
        self.mixes, self.first, self.last = mixes, first, last
        self.beside = not last
        hidden, m = ladder.hidden, ladder.width
        if first:
            self._add_linear("first", hidden, m, device)
        if mixes:
            self._add_linear("down", hidden, m, device)
            self.alpha = Parameter(torch.zeros(1, dtype=torch.float32, device=device))
            self._add_norm("norm", m, device)
            self._add_linear("inner", m, _EXPANSION * m, device)
            self._add_linear("outer", _EXPANSION * m, m, device)
        if last:
            self._add_norm("final_norm", m, device)
            self._add_linear("up", m, hidden, device)
            init.zeros_(self.get_parameter("up_weight"))

    def _add_linear(self, name: str, n_in: int, n_out: int, device: torch.device) -> None:
        weight = torch.empty(n_out, n_in, dtype=torch.float32, device=device)
        init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.register_parameter(f"{name}_weight", Parameter(weight))
        self.register_parameter(f"{name}_bias", Parameter(torch.zeros(n_out, dtype=torch.float32, device=device)))

    def _add_norm(self, name: str, m: int, device: torch.device) -> None:
        self.register_parameter(f"{name}_weight", Parameter(torch.ones(m, dtype=torch.float32, device=device)))
        self.register_parameter(f"{name}_bias", Parameter(torch.zeros(m, dtype=torch.float32, device=device)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        return F.layer_norm(x, (len(weight),), weight.to(x.dtype), bias.to(x.dtype))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the backbone's layer without autograd and the side layer with it."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        # another ladder inside has made its part of the graph already, and cut the backbone out of it itself
        with torch.set_grad_enabled(torch.is_grad_enabled() and _has_rung(base)):
            output = base(*args, **kwargs)
        h: Tensor = output[0] if isinstance(output, tuple) else output
        widths = x.shape[-1], h.shape[-1]
        if widths != (self.ladder.hidden, self.ladder.hidden):
            raise RuntimeError(
                f"LadderSideTuning needs layers of one width, but {self.place!r} takes {widths[0]} and gives "
                f"{widths[1]}, where the ladder is for {self.ladder.hidden}; name layers of one width in layer_modules"
            )
        s = self.side(_apart(h), self._state(x))
        if not self.last:
            setattr(h, _STATES, {**getattr(h, _STATES, {}), self.ladder: s})
            return output
        h = h + self._linear("up", self._norm("final_norm", s))
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _state(self, x: Tensor) -> Tensor:
        """The side state before this layer, made of or carried by the layer's input."""
        if self.first:
            return self._linear("first", _apart(x).to(self.get_parameter("first_weight").device))
        states = getattr(x, _STATES, {})
        if self.ladder not in states:
            raise RuntimeError(
                "LadderSideTuning: a layer got another tensor than the layer before it gave, or was recomputed with "
                "other adapters active than in its forward, so the side state is lost. Name layers that follow each "
                "other in layer_modules, leave out hooks that replace what a layer gives, and call backward() before "
                "you change the active adapters"
            )
        return cast(Tensor, states[self.ladder])

    def side(self, h: Tensor, s: Tensor) -> Tensor:
        """The next side state; ``(..., hidden)``, ``(..., m)`` -> ``(..., m)``."""
        s = s.to(h)
        if not self.mixes:
            return s
        mu = torch.sigmoid(self.alpha / self.ladder.temperature).to(h.dtype)
        z = mu * self._linear("down", h) + (1 - mu) * s
        change = self._linear("outer", F.gelu(self._linear("inner", self._norm("norm", z))))
        return z + F.dropout(change, self.ladder.dropout, self.training)


def _width_in(layer: Module) -> int | None:
    """The width that a layer takes, where it says one."""
    width = getattr(layer, "in_features", None)
    return width if isinstance(width, int) else None


def _apart(h: Tensor) -> Tensor:
    """The hidden state as another tensor of the same values.

    The graph of a side state keeps its input, and the hidden state keeps the side state: were it one tensor, neither
    would ever be freed after a forward without a backward.
    """
    return h.clone() if h.requires_grad else h.detach()


def _has_rung(base: Callable[..., Any]) -> bool:
    """Whether another adapter's ladder has a rung inside what this one was given to call."""
    while isinstance(base, functools.partial):
        if isinstance(base.func, _Rung):
            return True
        base = base.args[0]
    return False
