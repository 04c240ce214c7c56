"""Deep prompts: every layer has trained vectors of its own at the prompt's positions (P-tuning v2, arXiv 2110.07602).

At the input of each layer the hidden states of ``n`` virtual tokens before the text are replaced by that layer's
``(n, hidden)``. Deviation: the authors' code hands each layer keys and values instead, which is prefix tuning; here the
vectors are hidden states, as in the paper's figure, and go through the layer's own projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.per_forward import PerForward
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.reader import find_layers
from lightning_peft.methods.virtual_tokens import VirtualEmbedding, number_problem, place_virtual_tokens


@dataclass
class DeepPrompt:
    """Trains vectors before the text at the input of every layer: ``h[:, prompt] = P_l`` with ``P_l: (n, hidden)``.

    The first layer's are virtual tokens, which start at the embeddings of random tokens; the others start at random, as
    wide as the embeddings. In an encoder-decoder the encoder has the prompt.

    Args:
        num_virtual_tokens: how many, 1 to 1000. They count against the model's positions.
        layer_modules: all layers, from the first on, of a model whose stack is not found: names, suffixes or an
            expression.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_virtual_tokens: int = 20
    layer_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "DeepPrompt",
            [
                *range_problems(self, positive=["learning_rate"]),
                number_problem(self.num_virtual_tokens),
            ],
        )

    def place(self, model: Module) -> Placement:
        """The layers of virtual tokens, and one on each layer of the model after the first.

        Args:
            model: the root, or something with exactly one language model in it.

        Raises:
            ValueError: if there is no language model, or several, or one whose encoder does not read tokens, or
                the layers are not found.
        """
        n, prompt_at = self.num_virtual_tokens, PerForward[Tensor]()
        placement = place_virtual_tokens("DeepPrompt", n, model, lambda _, e: _FirstPrompt(n, e), prompt_at)
        (width,) = (layer.width for layer in placement.layers.values() if isinstance(layer, _FirstPrompt))
        names, hidden = find_layers("DeepPrompt", model, self.layer_modules)
        for name in names[1:]:
            start = torch.randn(n, hidden, device=device_for(model.get_submodule(name))) * width
            placement.layers[name] = _LaterPrompt(start, prompt_at)
        return placement


class _FirstPrompt(VirtualEmbedding):
    """The first layer's ``prompt: (n, hidden)``, as embeddings of virtual tokens."""

    divisible: ClassVar[bool] = False

    def __init__(self, n: int, embedding: Embedding) -> None:
        super().__init__()
        with torch.no_grad():
            rows = embedding(torch.randint(embedding.num_embeddings, (n,), device=device_for(embedding))).float()
            self.width = float(rows.std())
        self.prompt = Parameter(rows.clone())

    def vectors(self) -> Tensor:
        return self.prompt


class _LaterPrompt(AdapterLayer):
    """A further layer's ``prompt: (n, hidden)`` in place of what the layer before made at these positions."""

    divisible: ClassVar[bool] = False

    def __init__(self, start: Tensor, prompt_at: PerForward[Tensor]) -> None:
        super().__init__()
        self.prompt = Parameter(start.float())
        self.prompt_at = prompt_at

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the layer on ``(batch, n + tokens, hidden)`` with the prompt in it."""
        place = self.prompt_at.read()
        if place is None:
            raise RuntimeError(
                "DeepPrompt: a layer ran without the model's forward around it, which says where the prompt is; call "
                "the model, and checkpoint activations with use_reentrant=False and not within one another"
            )
        if args:
            return base(self._with_prompt(args[0], place), *args[1:], **kwargs)
        return base(**{**kwargs, "hidden_states": self._with_prompt(kwargs["hidden_states"], place)})

    def _with_prompt(self, h: Tensor, place: Tensor) -> Tensor:
        if place.shape[1] == 0:
            return h
        prompt = self.prompt.to(h.dtype).expand(len(h), -1, -1)
        return h.scatter(1, place.unsqueeze(-1).expand_as(prompt), prompt)
