"""Trainable tokens: chosen rows of the embedding are trained, everywhere that the embedding's weight is read.

``E[t] = R[i]`` for the i-th chosen token ``t``; the other rows of ``E: (vocabulary, hidden)`` stay. There is no paper;
Hugging Face PEFT's method of this name is followed, with one difference: a tied output head keeps its bias, which
PEFT 0.21 leaves out once the head is adapted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.base import innermost
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of, is_within, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import an, raise_problems, refuse_unknown
from lightning_peft.methods.reader import find_reader, input_embedding


@dataclass
class TrainableTokens:
    """Trains the embedding's rows ``R: (n, hidden)`` of ``n`` chosen tokens; a tied output head reads them too.

    Where the head shares the embedding's weight (GPT-2, T5), the chosen tokens' logits come from the same trained
    rows: ``x R^T + b`` stands in their place.

    Args:
        token_indices: the tokens' ids, each once, from 0 up to the vocabulary's last; at least one is needed. New
            tokens are what this is made for: resize the embedding first, then name their ids.
        target_modules: a list of exact names or dotted suffixes, or a regular expression for the whole name, of
            Embedding or Linear modules that hold a row for each token; None takes the model's input embedding. All
            modules that share a target's weight are adapted with it.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; large, since few rows move and each is seen seldom.

    Raises:
        ValueError: if an id is no whole number of 0 or more, or stands twice.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import adapt
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> adapter = adapt(model, TrainableTokens([7, 2], target_modules=["0"]))
        >>> {name: tuple(rows.shape) for name, rows in adapter.state_dict().items()}
        {'0.trainable_tokens_delta': (2, 4)}
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "TrainableTokens",
            [
                *range_problems(self, positive=["learning_rate"]),
                token_problem("token_indices", self.token_indices),
            ],
        )

    def place(self, model: Module) -> Placement:
        """A layer on each target and on every module that shares its weight; they read one parameter.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if no token is named, one is outside the vocabulary, or a target has no row for each token.
        """
        named = self.modules_to_save
        return Placement(token_layers("TrainableTokens", model, self.target_modules, self.token_indices, named))

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; tied modules are found anew by whoever loads it."""
        owners = token_places("TrainableTokens", model, self.target_modules)
        return {"token_indices": self.token_indices, "target_modules": sorted(owners)}

    def peft_name(self, key: str, model: Module) -> str:
        """The name of a tensor in a PEFT file: its own behind ``base_model.model.``."""
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> TrainableTokens:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here.
        """
        names = ("token_indices", "target_modules", "modules_to_save")
        # how the rows started says nothing of rows that are in the file
        refuse_unknown("TrainableTokens", config, known=[*names, "init_weights", "runtime_config"])
        return cls(**{n: config[n] for n in names if config.get(n) is not None})


def token_problem(option: str, tokens: Sequence[int]) -> str | None:
    """What is wrong with a list of token ids, whatever the vocabulary; None if nothing is.

    Args:
        option: the option that holds it.
        tokens: the ids.
    """
    odd = [t for t in tokens if t < 0]
    if odd:
        return f"{option} must be whole numbers of 0 or more, but {odd[0]} is among them"
    twice = [t for t, times in Counter(tokens).items() if times > 1]
    return f"{option} must name each token once, but {twice[0]} stands twice" if twice else None


def token_places(
    method: str, model: Module, target: list[str] | str | None, option: str = "target_modules"
) -> dict[str, list[str]]:
    """Who owns the trained rows, and who else reads the same weight.

    Args:
        method: the method's name, for errors.
        model: the root.
        target: patterns of modules, or None for the input embedding. Of those that share a weight the first Embedding
            owns the rows.
        option: the option that holds them, for errors.

    Returns:
        Owners, and for each the other modules with its weight, targeted or not.

    Raises:
        ValueError: if a pattern matches nothing that holds rows, or the model has no input embedding.
    """
    modules = base_modules(model)
    if target is None:
        embedding = input_embedding(find_reader(method, model).host)
        names = [n for n, m in modules.items() if m is embedding]
    else:
        names = match_modules(model, target, suits=_holds_rows, kinds="Embedding or Linear", option=option)
    weights = {n: m._parameters.get("weight") for n, m in modules.items()}
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: not isinstance(modules[n], Embedding)):
        if not any(name in tied for tied in found.values()):
            found[name] = [n for n, w in weights.items() if n != name and w is not None and w is weights[name]]
    return found


def token_layers(
    method: str,
    model: Module,
    target: list[str] | str | None,
    tokens: Sequence[int],
    saved: list[str] | None,
    *,
    options: tuple[str, str] = ("target_modules", "token_indices"),
) -> dict[str, AdapterLayer]:
    """The layers on modules that hold rows for tokens, and on those that share their weights.

    Args:
        method: the method's name, for errors.
        model: the root; it is not changed.
        target: patterns of modules, or None for the input embedding.
        tokens: the chosen ids.
        saved: patterns of modules that train in full.
        options: the options that hold the patterns and the ids, for errors.

    Raises:
        ValueError: if the ids are none or beyond the vocabulary, or a module does not suit.
    """
    copies = match_modules(model, saved, option="modules_to_save") if saved else []
    layers: dict[str, AdapterLayer] = {}
    for owner, tied in token_places(method, model, target, options[0]).items():
        source: TokenRows | None = None
        for name in (owner, *tied):
            module = model.get_submodule(name)
            _refuse_unfit(name, module, tokens, options[1])
            if is_within(name, copies):
                raise ValueError(
                    f"{method}: {name!r} reads the trained rows and cannot train in full beside them; leave it out of "
                    "modules_to_save, or untie it"
                )
            kind: type[TokenRows] = EmbeddingRows if isinstance(module, Embedding) else HeadRows
            layer = kind(module, tokens, source)
            source = layer if source is None else source
            layers[name] = layer
    return layers


def _holds_rows(module: Module) -> bool:
    return isinstance(module, (Embedding, Linear))


def _refuse_unfit(name: str, module: Any, tokens: Sequence[int], option: str) -> None:
    what = class_of(module).__name__
    weight = module._parameters.get("weight")
    if not _holds_rows(module) or weight is None or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"{name!r}, {an(what)}, is to read trained rows; expected an Embedding or Linear whose weight is there in "
            "floating point, neither quantized nor offloaded"
        )
    if not tokens:
        raise ValueError(f"{option} is empty; name the ids of the tokens to train, such as [5, 8]")
    if max(tokens) >= len(weight):
        raise ValueError(f"{option}: {max(tokens)} is beyond {name!r}, which has the tokens 0 to {len(weight) - 1}")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{name!r} rescales its own rows (max_norm={module.max_norm}), which trained rows cannot follow"
        )


class TokenRows(AdapterLayer):
    """The trained rows of one weight; the layers of modules that share it hold none and read the owner's.

    What is added is ``R - E[tokens]``, so several adapters add up as their merged weights do.

    Args:
        module: the module.
        tokens: the chosen ids.
        source: the owner's layer, or None if this is the owner's.
    """

    def __init__(self, module: Any, tokens: Sequence[int], source: TokenRows | None) -> None:
        super().__init__()
        self.source = (source,)  # a tuple, so that the owner is not registered here too
        # the ids are an option of the method, so no file needs them once more
        self.register_buffer("tokens", torch.tensor(list(tokens), device=device_for(module)), persistent=False)
        if source is None:
            rows = module.weight.detach()[self.get_buffer("tokens")]
            self.trainable_tokens_delta = Parameter(rows.float().clone())

    def change(self, module: Any) -> Tensor:
        """What the rows differ by from the base's, ``(n, hidden)``."""
        (source,) = self.source
        rows = self.trainable_tokens_delta if source is None else source.trainable_tokens_delta
        tokens = self.get_buffer("tokens")
        base: Tensor = module.weight[tokens.to(module.weight.device)]
        return rows - base.to(rows)

    def deltas(self, module: Any) -> dict[str, Tensor]:
        """The change of the whole weight: zero but in the chosen rows."""
        whole = torch.zeros_like(module.weight, dtype=torch.float32)
        tokens = self.get_buffer("tokens").to(whole.device)
        return {"weight": whole.index_copy(0, tokens, self.change(module).to(whole))}


class EmbeddingRows(TokenRows):
    """On an Embedding; ids of any shape ``(...)`` -> ``(..., hidden)``."""

    def __init__(self, module: Any, tokens: Sequence[int], source: TokenRows | None) -> None:
        super().__init__(module, tokens, source)
        # for each token of the vocabulary its place among the chosen ones, from 1; 0 is nowhere
        slots = torch.zeros(len(module.weight), dtype=torch.int32, device=device_for(module))
        slots[self.get_buffer("tokens")] = torch.arange(1, len(tokens) + 1, dtype=torch.int32, device=slots.device)
        self.register_buffer("slots", slots, persistent=False)
        padding = module.padding_idx
        self.padding_slot = tokens.index(padding) + 1 if padding in tokens else None

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Looks the ids up, and the change of the chosen ones by the module's own forward, which may scale it."""
        y: Tensor = base(ids)
        inner = innermost(base)
        change = self.change(inner.module).to(y.dtype)
        small: Any = inner.view({"weight": torch.cat([torch.zeros_like(change[:1]), change])})
        small.padding_idx, small.sparse = self.padding_slot, False
        slots = self.get_buffer("slots")
        more: Tensor = inner.cls.forward(small, slots[ids.to(slots.device)])
        return y + more.to(y)


class HeadRows(TokenRows):
    """On a Linear that turns hidden states into logits; ``(..., hidden)`` -> ``(..., vocabulary)``."""

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """Computes all logits, and adds to the chosen tokens' what their rows' change gives."""
        y: Tensor = base(x)
        change = self.change(innermost(base).module)
        more = F.linear(x.to(y), change.to(y)).to(y.dtype)
        return y.index_add(-1, self.get_buffer("tokens").to(y.device), more)
