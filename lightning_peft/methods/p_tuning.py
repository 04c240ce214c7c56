"""P-tuning: the virtual tokens come out of a small trained network (Liu et al., arXiv 2103.10385, 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import LSTM, Embedding, Linear, Module, Parameter, ReLU, Sequential

from lightning_peft.core.layer import device_for
from lightning_peft.core.method import Method, Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems, refuse_unknown
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.virtual_tokens import VirtualEmbedding, number_problem, place_virtual_tokens

_ENCODERS = ("LSTM", "MLP")
_DESCRIBED = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")


@dataclass
class PTuning:
    """Trains a network that makes the vectors before the text: ``MLP(E)`` or ``MLP(LSTM(E))`` of ``E: (n, hidden)``.

    The network ties the vectors together, which the paper finds easier to train than free ones; when the adapter is
    written for others, only what it gives is needed.

    Args:
        num_virtual_tokens: how many, 1 to 1000. They count against the model's positions.
        encoder_reparameterization_type: ``"MLP"`` (three layers) or ``"LSTM"`` (bidirectional, then two layers).
        encoder_hidden_size: width inside the network; None takes the model's.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: between the LSTM's layers, from 0 up to but not including 1.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    modules_to_save: list[str] | None = None
    learning_rate: float = 6e-2

    peft_type: ClassVar[str | None] = "P_TUNING"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        kind = self.encoder_reparameterization_type
        raise_problems(
            "PTuning",
            [
                *range_problems(
                    self,
                    counts=["encoder_hidden_size", "encoder_num_layers"],
                    positive=["learning_rate"],
                    shares=["encoder_dropout"],
                ),
                number_problem(self.num_virtual_tokens),
                f"encoder_reparameterization_type {kind!r} is unknown{nearest(kind, _ENCODERS)}"
                if kind not in _ENCODERS
                else None,
                "encoder_dropout is between the layers of an LSTM, and there are none"
                if self.encoder_dropout and (kind != "LSTM" or self.encoder_num_layers == 1)
                else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """One layer on the model that reads the text, one on its input embedding.

        Args:
            model: the root, or something with exactly one language model in it.

        Raises:
            ValueError: if there is no language model, or several, or one whose encoder does not read tokens.
        """
        n = self.num_virtual_tokens
        return place_virtual_tokens("PTuning", n, model, lambda _, embedding: _EncodedEmbedding(self, embedding))

    def encoder(self, hidden: int, device: torch.device) -> Module:
        """The network, ``(n, hidden)`` -> ``(n, hidden)``, in float32.

        Args:
            hidden: the model's width.
            device: where it is to be.
        """
        width = self.encoder_hidden_size or hidden
        kind: dict[str, Any] = {"device": device, "dtype": torch.float32}
        if self.encoder_reparameterization_type == "LSTM":
            return _LSTMEncoder(hidden, width, self.encoder_num_layers, self.encoder_dropout, kind)
        sizes = (hidden, width, width, hidden)
        first, second, third = (Linear(i, o, **kind) for i, o in itertools.pairwise(sizes))
        return Sequential(first, ReLU(), second, ReLU(), third)

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``."""
        ours = ("modules_to_save", "learning_rate")
        return {"num_transformer_submodules": 1} | {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ours
        }

    def peft_name(self, key: str, model: Module) -> str:
        """The vectors stand bare in a PEFT file; the network, which it does not read, under a name of its own."""
        leaf = key.rpartition(".")[2]
        return leaf if leaf == "prompt_embeddings" else f"base_model.{key}"

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, and the vectors that the network gives, which are all that PEFT reads."""
        place = next(k for k in tensors if k.endswith("virtual")).removesuffix("virtual")
        rows = tensors[f"{place}virtual"]
        prefix = f"{place}encoder."
        weights = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        with torch.no_grad():
            network = self.encoder(rows.shape[1], rows.device).eval()
            return {**tensors, f"{place}prompt_embeddings": functional_call(network, weights, (rows,))}

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors without the vectors."""
        return {k: t for k, t in stored.items() if not k.endswith("prompt_embeddings")}

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Method:
        """A prompt: PEFT keeps the vectors that the network gave, not the network.

        Raises:
            ValueError: if it asks for something that is not supported here.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        refuse_unknown("PTuning", config, known=[*names, *_DESCRIBED])
        kept = {n: config.get(n) for n in ("num_virtual_tokens", "num_transformer_submodules", "modules_to_save")}
        return PromptTuning.from_peft_config(kept)


class _LSTMEncoder(Module):
    def __init__(self, hidden: int, width: int, layers: int, dropout: float, kind: dict[str, Any]) -> None:
        super().__init__()
        self.lstm = LSTM(hidden, width, layers, dropout=dropout, bidirectional=True, batch_first=True, **kind)
        self.head = Sequential(Linear(2 * width, 2 * width, **kind), ReLU(), Linear(2 * width, hidden, **kind))

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(rows)[0])
        return out


class _EncodedEmbedding(VirtualEmbedding):
    """``virtual: (n, hidden)`` through the network ``encoder``."""

    def __init__(self, method: PTuning, embedding: Embedding) -> None:
        super().__init__()
        device = device_for(embedding)
        hidden = embedding.embedding_dim
        self.virtual = Parameter(torch.randn(method.num_virtual_tokens, hidden, dtype=torch.float32, device=device))
        self.encoder = method.encoder(hidden, device)

    def vectors(self) -> Tensor:
        # outside autocast: the network is small, and in 16 bits its vectors would be
        with torch.autocast(self.virtual.device.type, enabled=False):
            out: Tensor = self.encoder(self.virtual)
        return out
