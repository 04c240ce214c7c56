"""Prompt tuning: trained vectors stand before the text (Lester et al., arXiv 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from lightning_peft.core.filled import are_filled_later
from lightning_peft.core.layer import device_for
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems, refuse_unknown
from lightning_peft.methods.virtual_tokens import VirtualEmbedding, number_problem, place_virtual_tokens

_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass
class PromptTuning:
    """Trains vectors that stand before the embedded text, on encoders, decoders and encoder-decoders.

    Args:
        num_virtual_tokens: how many, 1 to 1000. They count against the model's positions.
        prompt_tuning_init: ``"SAMPLE_VOCAB"`` (embeddings of random tokens, which the paper finds better than
            random vectors), ``"RANDOM"`` (normal, as wide as the embeddings), ``"TEXT"``.
        prompt_tuning_init_text: the text for ``"TEXT"``, repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: its tokenizer; None takes the model's own name.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; large, as the paper's 0.3 (for Adafactor), since nothing else moves.

    Raises:
        ValueError: if a number or a choice is out of its range, or the text is missing.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 3e-2

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        kind = self.prompt_tuning_init
        raise_problems(
            "PromptTuning",
            [
                *range_problems(self, positive=["learning_rate"]),
                number_problem(self.num_virtual_tokens),
                f"prompt_tuning_init {kind!r} is unknown{nearest(kind, _INITS)}" if kind not in _INITS else None,
                "prompt_tuning_init='TEXT' needs prompt_tuning_init_text"
                if kind == "TEXT" and not self.prompt_tuning_init_text
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
        return place_virtual_tokens(
            "PromptTuning", self.num_virtual_tokens, model, lambda host, e: _PromptEmbedding(self, host, e)
        )

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; on encoder-decoders only the encoder has a prompt, as in the paper."""
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": self.prompt_tuning_init,
            "prompt_tuning_init_text": self.prompt_tuning_init_text,
            "tokenizer_name_or_path": self.tokenizer_name_or_path,
        }

    def peft_name(self, key: str, model: Module) -> str:
        """The prompt stands bare in a PEFT file, saved modules behind ``base_model.``."""
        return "prompt_embeddings" if key.endswith("prompt_embeddings") else f"base_model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> PromptTuning:
        """The prompt tuning that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for something that is not supported here, such as prompts in a decoder too.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        described = ["token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"]
        refuse_unknown("PromptTuning", config, known=[*names, *described])
        if config.get("num_transformer_submodules") not in (None, 1):
            raise ValueError(
                "PromptTuning: num_transformer_submodules=2 puts a prompt into the decoder too; only the "
                "encoder's (1) is supported"
            )
        options = {n: config[n] for n in names if config.get(n) is not None}
        # the values come from the file: nothing needs to be tokenized for them
        options |= {"prompt_tuning_init": "RANDOM"}
        return cls(**options)


class _PromptEmbedding(VirtualEmbedding):
    """The vectors are the parameter itself, ``prompt_embeddings: (n, hidden)``."""

    def __init__(self, method: PromptTuning, host: Module, embedding: Embedding) -> None:
        super().__init__()
        n = method.num_virtual_tokens
        device = device_for(embedding)
        with torch.no_grad():
            if method.prompt_tuning_init == "TEXT" and not are_filled_later():
                ids = _text_ids(method, host, n).to(device)
            else:
                ids = torch.randint(embedding.num_embeddings, (n,), device=device)
            rows = embedding(ids).float()
            if method.prompt_tuning_init == "RANDOM":
                rows = torch.randn_like(rows) * rows.std()
        self.prompt_embeddings = Parameter(rows.clone())

    def vectors(self) -> Tensor:
        return self.prompt_embeddings


def _text_ids(method: PromptTuning, host: Module, n: int) -> Tensor:
    from transformers import AutoTokenizer

    name = method.tokenizer_name_or_path or getattr(host.config, "name_or_path", "")
    if not name:
        raise ValueError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, since the model has no name")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    ids = tokenizer(method.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={method.prompt_tuning_init_text!r} gives no token")
    return torch.tensor((ids * (n // len(ids) + 1))[:n])
