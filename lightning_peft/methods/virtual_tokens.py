"""What prompt tuning, P-tuning and deep prompts share: trained vectors that stand before the text as virtual tokens.

The whole-model layer puts stand-in ids before the text's and extends masks, positions and labels; the layer on the
input embedding turns the stand-ins, ``-1`` to ``-n``, into the trained vectors. So everything that a model reads
off its ids (padding, positions, the last token of a row) stays right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, class_of
from lightning_peft.core.method import Placement
from lightning_peft.core.per_forward import PerForward
from lightning_peft.core.problems import an
from lightning_peft.methods.reader import find_reader, input_embedding

_TRIMMED = ("logits", "last_hidden_state", "start_logits", "end_logits")


def place_virtual_tokens(
    method: str,
    n: int,
    model: Module,
    make: Callable[[Module, Embedding], VirtualEmbedding],
    prompt_at: PerForward[Tensor] | None = None,
) -> Placement:
    """One layer on the model that reads the text, one on its input embedding.

    Args:
        method: its name, for errors.
        n: number of virtual tokens.
        model: the root, or something with exactly one language model in it.
        make: makes the embedding's layer from the language model and its input embedding.
        prompt_at: tells further layers where the virtual tokens stand, ``(batch, n)``, or ``(batch, 0)`` once they are
            in the cache.

    Raises:
        ValueError: if there is no language model, or several, or one whose encoder does not read tokens.
    """
    reader = find_reader(method, model)
    host = reader.host
    encoder = reader.module is not host
    prepend = _Prepend(method, n, reader.module, prompt_at or PerForward(), trim=not encoder)
    layers: dict[str, AdapterLayer] = {reader.name: prepend}
    names = {id(m): name for name, m in base_modules(model).items()}
    if encoder:
        layers[names[id(host.get_decoder())]] = _ExtendCrossMask(n)
    embedding = input_embedding(reader.module)
    if embedding is None:
        raise ValueError(
            f"{method}: the encoder of {class_of(host).__name__}, {an(class_of(reader.module).__name__)}, embeds no "
            "tokens, so there is nothing to put virtual tokens before; choose another method for this model"
        )
    layers[names[id(embedding)]] = make(host, embedding)
    return Placement(layers)


class VirtualEmbedding(AdapterLayer):
    """Embeds ids, the stand-ins by ``vectors()``; ``(batch, tokens)`` -> ``(batch, tokens, hidden)``."""

    def vectors(self) -> Tensor:
        """The virtual tokens' embeddings, ``(n, hidden)``."""
        raise NotImplementedError(f"{type(self).__name__} must define vectors()")

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Looks up the text and puts the trained vectors where the stand-ins are."""
        embedded: Tensor = base(ids.clamp_min(0))
        virtual = self.vectors().to(embedded.dtype)
        chosen = virtual[(-ids - 1).clamp(0, len(virtual) - 1)]
        return torch.where((ids < 0).unsqueeze(-1), chosen, embedded)


def first_position(model: Module) -> int:
    """The position of a row's first token: RoBERTa-like models count from behind the padding's.

    Args:
        model: the module that reads the text.
    """
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(m, "padding_idx", None) for m in tables), None)
    return 0 if padding is None else padding + 1


def number_problem(n: int) -> str | None:
    """What is wrong with a number of virtual tokens, or None.

    Args:
        n: the option ``num_virtual_tokens``.
    """
    return None if 1 <= n <= 1000 else f"num_virtual_tokens must be 1 to 1000, but got {n}"


def require_room(n: int, text: int, room: int | None) -> None:
    """Refuses a text that does not fit the model's positions together with the virtual tokens.

    Args:
        n: number of virtual tokens.
        text: number of the text's.
        room: number of positions, or None where there is no limit.

    Raises:
        ValueError: if they exceed it.
    """
    if room is not None and n + text > room:
        raise ValueError(
            f"{n} virtual tokens and {text} of text exceed the model's {room} positions; cut "
            f"the text to {room - n}, or take fewer virtual tokens"
        )


class _Prepend(AdapterLayer):
    """Puts ``n`` stand-ins before the text and takes their outputs away again."""

    def __init__(self, method: str, n: int, host: Module, prompt_at: PerForward[Tensor], *, trim: bool) -> None:
        super().__init__()
        self.method = method
        self.prompt_at = prompt_at
        self.n = n
        self.trim = trim
        self.names = [p for p in inspect.signature(host.forward).parameters]
        self.limit: int | None = getattr(host.config, "max_position_embeddings", None)
        # An encoder that is read at its first position must find the prompt there, whatever the padding
        self.ahead_of_padding = "position_ids" in self.names and "past_key_values" not in self.names
        self.first_position = first_position(host)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.names, args, strict=False)) | kwargs
        source = values.get("input_ids")
        if source is None:
            raise ValueError(f"{self.method} puts its vectors before token ids; pass input_ids, not inputs_embeds")
        cached = _cached_tokens(self.method, values.get("past_key_values"))
        length = source.shape[1]
        given = self._text_mask(values.get("attention_mask"), source, length + max(cached - self.n, 0))
        text = torch.ones_like(given) if self.ahead_of_padding else given
        mask = _before_text(given, given.new_ones(len(given), self.n), text)
        values["attention_mask"] = mask
        if "position_ids" in self.names:
            values["position_ids"] = self._positions(values.get("position_ids"), mask, text, length, bool(cached))
        first = text.long().argmax(1, keepdim=True)
        if cached:  # the prompt is in the cache
            with self.prompt_at.passing(first[:, :0]):
                return base(**values)
        self._extend(values, source, text)
        with self.prompt_at.passing(first + torch.arange(self.n, device=first.device)):
            output = base(**values)
        return self._trimmed(output, text) if self.trim else output

    def _text_mask(self, given: Any, source: Tensor, length: int) -> Tensor:
        if given is None:
            given = torch.ones(source.shape[0], length, dtype=torch.long, device=source.device)
        if not isinstance(given, Tensor) or given.dim() != 2:
            what = f"a {tuple(given.shape)} tensor" if isinstance(given, Tensor) else an(type(given).__name__)
            raise ValueError(
                f"{self.method} extends an attention_mask of (batch, tokens), but got {what}; static caches and "
                "packed batches make such masks: use a dynamic cache and plain padding"
            )
        require_room(self.n, given.shape[1], None if self.limit is None else self.limit - self.first_position)
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


def _cached_tokens(method: str, cache: Any) -> int:
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"{method} cannot use {an(type(cache).__name__)}: its size was computed without the virtual tokens; "
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
