"""Prompt tuning: trained vectors stand before the text (Lester et al., arXiv 2104.08691).

The whole-model layer puts stand-in ids before the text's and extends masks, positions and labels; the layer on the
input embedding turns the stand-ins, ``-1`` to ``-n``, into the trained ``prompt_embeddings: (n, hidden)``. So
everything that a model reads off its ids (padding, positions, the last token of a row) stays right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of
from lightning_peft.core.method import Placement
from lightning_peft.core.problems import nearest, raise_problems, refuse_unknown

_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
_TRIMMED = ("logits", "last_hidden_state", "start_logits", "end_logits")


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
        learning_rate: suits AdamW; large, as the paper's 0.3, since nothing else moves.

    Raises:
        ValueError: if a number or a choice is out of its range, or the text is missing.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-2

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kind = self.prompt_tuning_init
        raise_problems(
            "PromptTuning",
            [
                f"num_virtual_tokens must be 1 to 1000, but got {self.num_virtual_tokens}"
                if not 1 <= self.num_virtual_tokens <= 1000
                else None,
                f"prompt_tuning_init {kind!r} is unknown{nearest(kind, _INITS)}" if kind not in _INITS else None,
                "prompt_tuning_init='TEXT' needs prompt_tuning_init_text"
                if kind == "TEXT" and not self.prompt_tuning_init_text
                else None,
                f"learning_rate must be above 0, but got {self.learning_rate}" if self.learning_rate <= 0 else None,
            ],
        )

    def place(self, model: Module) -> Placement:
        """One layer on the model that reads the text, one on its input embedding.

        Args:
            model: the root, or something with exactly one language model in it.

        Raises:
            ValueError: if there is no language model, or several, or one whose encoder does not read tokens.
        """
        place = _host(model)
        host: Any = model.get_submodule(place)
        names = {id(m): n for n, m in base_modules(model).items()}
        layers: dict[str, AdapterLayer] = {}
        if getattr(host.config, "is_encoder_decoder", False):
            reader, decoder = host.get_encoder(), host.get_decoder()
            layers[names[id(reader)]] = _Prepend(self.num_virtual_tokens, reader, trim=False)
            layers[names[id(decoder)]] = _ExtendCrossMask(self.num_virtual_tokens)
        else:
            reader = host
            layers[place] = _Prepend(self.num_virtual_tokens, host, trim=True)
        embedding = _input_embedding(reader)
        if embedding is None:
            raise ValueError(
                f"PromptTuning: the encoder of {class_of(host).__name__}, a {class_of(reader).__name__}, embeds no "
                "tokens, so there is nothing to put virtual tokens before; choose another method for this model"
            )
        layers[names[id(embedding)]] = _VirtualEmbedding(self, host, embedding)
        return Placement(layers)

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


def _host(model: Module) -> str:
    """The name of the one module that has input embeddings, outermost first."""
    found: list[str] = []
    for name, module in base_modules(model).items():
        if any(name == f or name.startswith(f"{f}.") or not f for f in found):
            continue
        if _input_embedding(module) is not None:
            found.append(name)
    if len(found) != 1:
        what = f"{found} in {class_of(model).__name__}" if found else f"none in {class_of(model).__name__}"
        raise ValueError(
            "PromptTuning needs exactly one module with get_input_embeddings() that embeds tokens, but found "
            f"{what}; " + ("name the one to adapt (model=...)" if found else "choose another method for this model")
        )
    return found[0]


def _input_embedding(module: Any) -> Embedding | None:
    if not hasattr(module, "get_input_embeddings") or not hasattr(module, "config"):
        return None
    try:
        embedding = module.get_input_embeddings()
    except NotImplementedError:  # transformers' vision models inherit the method and cannot answer it
        return None
    return embedding if isinstance(embedding, Embedding) else None


class _VirtualEmbedding(AdapterLayer):
    """Embeds ids, the stand-ins by ``prompt_embeddings: (n, hidden)``; ``(batch, tokens)`` -> ``(..., hidden)``."""

    def __init__(self, method: PromptTuning, host: Module, embedding: Embedding) -> None:
        super().__init__()
        n = method.num_virtual_tokens
        device = device_for(embedding)
        with torch.no_grad():
            if method.prompt_tuning_init == "TEXT":
                ids = _text_ids(method, host, n).to(device)
            else:
                ids = torch.randint(embedding.num_embeddings, (n,), device=device)
            rows = embedding(ids).float()
            if method.prompt_tuning_init == "RANDOM":
                rows = torch.randn_like(rows) * rows.std()
        self.prompt_embeddings = Parameter(rows.clone())

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        embedded: Tensor = base(ids.clamp_min(0))
        virtual = self.prompt_embeddings.to(embedded.dtype)[(-ids - 1).clamp(0, len(self.prompt_embeddings) - 1)]
        return torch.where((ids < 0).unsqueeze(-1), virtual, embedded)


def _text_ids(method: PromptTuning, host: Module, n: int) -> Tensor:
    from transformers import AutoTokenizer

    name = method.tokenizer_name_or_path or getattr(host.config, "name_or_path", "")
    if not name:
        raise ValueError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, since the model has no name")
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(method.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={method.prompt_tuning_init_text!r} gives no token")
    return torch.tensor((ids * (n // len(ids) + 1))[:n])


class _Prepend(AdapterLayer):
    """Puts ``n`` stand-ins before the text and takes their outputs away again."""

    def __init__(self, n: int, host: Module, *, trim: bool) -> None:
        super().__init__()
        self.n = n
        self.trim = trim
        self.names = [p for p in inspect.signature(host.forward).parameters]
        self.limit: int | None = getattr(host.config, "max_position_embeddings", None)
        # An encoder that is read at its first position must find the prompt there, whatever the padding
        self.ahead_of_padding = "position_ids" in self.names and "past_key_values" not in self.names
        # RoBERTa-like models count positions from behind the padding's
        tables = (m for name, m in host.named_modules() if name.endswith("position_embeddings"))
        padding = next((getattr(m, "padding_idx", None) for m in tables), None)
        self.first_position = 0 if padding is None else padding + 1

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.names, args, strict=False)) | kwargs
        source = values.get("input_ids")
        if source is None:
            raise ValueError("PromptTuning puts its vectors before token ids; pass input_ids, not inputs_embeds")
        cached = _cached_tokens(values.get("past_key_values"))
        length = source.shape[1]
        given = self._text_mask(values.get("attention_mask"), source, length + max(cached - self.n, 0))
        text = torch.ones_like(given) if self.ahead_of_padding else given
        mask = _before_text(given, given.new_ones(len(given), self.n), text)
        values["attention_mask"] = mask
        if "position_ids" in self.names:
            values["position_ids"] = self._positions(values.get("position_ids"), mask, text, length, bool(cached))
        if cached:  # the prompt is in the cache
            return base(**values)
        self._extend(values, source, text)
        output = base(**values)
        return self._trimmed(output, text) if self.trim else output

    def _text_mask(self, given: Any, source: Tensor, length: int) -> Tensor:
        if given is None:
            given = torch.ones(source.shape[0], length, dtype=torch.long, device=source.device)
        if not isinstance(given, Tensor) or given.dim() != 2:
            what = f"a {tuple(given.shape)} tensor" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise ValueError(
                f"PromptTuning extends an attention_mask of (batch, tokens), but got {what}; static caches and "
                "packed batches make such masks: use a dynamic cache and plain padding"
            )
        room = None if self.limit is None else self.limit - self.first_position
        if room is not None and self.n + given.shape[1] > room:
            raise ValueError(
                f"{self.n} virtual tokens and {given.shape[1]} of text exceed the model's {room} positions; cut "
                f"the text to {room - self.n}, or take fewer virtual tokens"
            )
        return given

    def _positions(self, given: Tensor | None, mask: Tensor, text: Tensor, length: int, cached: bool) -> Tensor:
        """From the extended mask, so that a padded row counts like the row alone; given ones are moved on."""
        if given is None:
            new = length if cached else self.n + length
            return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -new:] + self.first_position
        given = given.expand(len(text), -1) + self.n
        if cached:
            return given
        prefix = torch.arange(self.n, device=given.device).expand(len(text), -1)
        return _before_text(given, prefix + self.first_position, text)

    def _extend(self, values: dict[str, Any], source: Tensor, text: Tensor) -> None:
        batch, length = source.shape
        stand_ins = -torch.arange(1, self.n + 1, device=source.device).expand(batch, -1)
        values["input_ids"] = _before_text(source, stand_ins, text)
        types = values.get("token_type_ids")
        if types is not None:
            values["token_type_ids"] = _before_text(types, types.new_zeros(batch, self.n), text)
        labels = values.get("labels")
        # labels of a whole row are (batch,), or floats; those of tokens get nothing to say about the prompt
        if labels is not None and labels.shape == (batch, length) and not labels.is_floating_point():
            values["labels"] = _before_text(labels, labels.new_full((batch, self.n), -100), text)

    def _trimmed(self, output: Any, text: Tensor) -> Any:
        if isinstance(output, tuple):
            return tuple(self._text_part(part, text) for part in output)
        for key in _TRIMMED:
            if getattr(output, key, None) is not None:
                output[key] = self._text_part(output[key], text)
        return output

    def _text_part(self, part: Any, text: Tensor) -> Any:
        """An output without the prompt's; ``(batch, n + tokens, ...)`` -> ``(batch, tokens, ...)``."""
        length = text.shape[1]
        if not isinstance(part, Tensor) or part.dim() < 2 or part.shape[1] != self.n + length:
            return part
        first = text.long().argmax(1, keepdim=True)
        if not first.any():  # nothing stands before the prompt: a view will do
            return part[:, self.n :]
        place = torch.arange(length, device=part.device).expand(len(text), -1)
        return part[torch.arange(len(text), device=part.device).unsqueeze(1), place + self.n * (place >= first)]


def _before_text(row: Tensor, inserted: Tensor, mask: Tensor) -> Tensor:
    """Inserts ``n`` columns before each row's first token; ``(batch, tokens)`` -> ``(batch, n + tokens)``.

    Behind padding on the left, not before it: a sliding window and relative positions count the columns between.
    """
    n, total = inserted.shape[1], inserted.shape[1] + row.shape[1]
    first = mask.long().argmax(1, keepdim=True)
    place = torch.arange(total, device=row.device).expand(row.shape[0], -1)
    before, within = place < first, (place >= first) & (place < first + n)
    text = row.gather(1, torch.where(before, place, place - n).clamp_min(0))
    return torch.where(within, inserted.gather(1, (place - first).clamp(0, n - 1)), text)


def _cached_tokens(cache: Any) -> int:
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"PromptTuning cannot use a {type(cache).__name__}: its size was computed without the virtual tokens; "
            "use a dynamic cache"
        )
    return int(cache.get_seq_length())


class _ExtendCrossMask(AdapterLayer):
    """Makes a decoder's cross-attention see the encoder's virtual tokens."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and states.shape[1] == self.n + mask.shape[1]:
            kwargs["encoder_attention_mask"] = _before_text(mask, mask.new_ones(len(mask), self.n), mask)
        return base(*args, **kwargs)
