"""What methods with a prefix share: trained keys and values that attention reads before the text's.

They are put in at each attention module, behind the cache and not into it. So a cache stays the text's own, whether
it grows, slides or is static, and what activation checkpointing does, which takes the caches away, changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from lightning_peft.core.base import module_of
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, class_of, layer_number
from lightning_peft.core.problems import an
from lightning_peft.methods.reader import find_reader
from lightning_peft.methods.virtual_tokens import first_position, require_room

# what transformers' attention modules call a cache and a mask
_CACHES = ("past_key_values", "layer_past")
_MASKS = ("attention_mask", "mask")


class AttentionStack(NamedTuple):
    """The self-attention of the module that reads the text: a decoder, or an encoder that stands alone.

    Attributes:
        reader: name of the module that reads the text.
        names: names of its self-attention modules, first layer first.
        heads: number of heads of their keys.
        head_dim: length of a key.
        beside_encoder: whether it is the decoder of an encoder-decoder.
    """

    reader: str
    names: list[str]
    heads: int
    head_dim: int
    beside_encoder: bool


def find_attention(method: str, model: Module) -> AttentionStack:
    """The attention modules that a prefix goes into.

    Args:
        method: the method's name, for errors.
        model: the root, or something with exactly one language model in it.

    Raises:
        ValueError: if there is no language model or several, or its attention has no place for a prefix.
    """
    host = find_reader(method, model).host
    beside_encoder = bool(getattr(host.config, "is_encoder_decoder", False))
    reader: Any = host.get_decoder() if beside_encoder else host
    config = reader.config.get_text_config(decoder=True)
    inside = {n: m for n, m in base_modules(reader).items() if _arguments(m).intersection(_CACHES)}
    stacks: dict[str, dict[int, str]] = {}
    for name in inside:
        number = layer_number(name)
        if number is not None and not any(n.startswith(f"{name}.") for n in inside):
            # the first of a layer: cross-attention comes behind
            stacks.setdefault(number[0], {}).setdefault(number[1], name)
    whole = {s: layers for s, layers in stacks.items() if len(layers) == len(list(reader.get_submodule(s).children()))}
    if len(stacks) != 1 or not whole:
        raise ValueError(
            f"{method} needs one stack of layers whose attention takes keys and values from before the text "
            f"({' or '.join(_CACHES)}), but {class_of(reader).__name__} has {sorted(stacks) or 'none'}"
            f"{' with layers of another kind among them' if len(stacks) == 1 else ''}; PromptTuning asks for less"
        )
    place = {id(m): n for n, m in base_modules(model).items()}
    ((_, layers),) = whole.items()
    names = [place[id(inside[layers[number]])] for number in sorted(layers)]
    _refuse_unsuited(method, model.get_submodule(names[0]), config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return AttentionStack(place[id(reader)], names, keys, head_dim, beside_encoder)


def _arguments(module: Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _refuse_unsuited(method: str, attention: Module, config: Any) -> None:
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in (None, "sdpa", "eager"):
        raise ValueError(
            f"{method} widens attention masks, which attn_implementation={kernel!r} does not take; load the model "
            "with 'sdpa' or 'eager'"
        )
    names = _arguments(attention)
    # T5's bias, beside its keys for cross-attention, is made inside and counts the prefix
    outside = "position_bias" in names and "key_value_states" not in names
    if outside or ("alibi" in names and getattr(config, "alibi", True)):
        raise ValueError(
            f"{method}: {class_of(attention).__name__} is given a bias by distance (ALiBi) that is as long as the "
            "text, so a prefix has no place in it; choose another method for this model"
        )


def position_layers(reader: Module, name: str, n: int) -> dict[str, AdapterLayer]:
    """The layers that make the text's positions begin behind the prefix, in models that count inside.

    Args:
        reader: the module that reads the text.
        name: its name.
        n: length of the prefix.

    Returns:
        By module name; nothing where the reader takes ``position_ids``, or counts distances (T5).
    """
    if "position_ids" in _arguments(reader):
        return {}
    prefix = f"{name}." if name else ""
    counting = [m for m, module in base_modules(reader).items() if "past_key_values_length" in _arguments(module)]
    return {f"{prefix}{m}": _ShiftedPositions(n, reader.get_submodule(m)) for m in counting}


class _ShiftedPositions(AdapterLayer):
    """An embedding of positions (BART and its kin) that begins to count at ``n``."""

    def __init__(self, n: int, module: Module) -> None:
        super().__init__()
        self.n = n
        self.names = list(inspect.signature(module.forward).parameters)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.names, args, strict=False)) | kwargs
        values["past_key_values_length"] = values.get("past_key_values_length", 0) + self.n
        if values.get("position_ids") is not None:
            values["position_ids"] = values["position_ids"] + self.n
        return base(**values)


class PrefixReader(AdapterLayer):
    """On the module that reads the text: its positions begin behind the prefix, and padding takes none.

    Args:
        n: length of the prefix.
        reader: the module that reads the text.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, n: int, reader: Any) -> None:
        super().__init__()
        self.n = n
        self.names = list(inspect.signature(reader.forward).parameters)
        self.first_position = first_position(reader)
        limit = getattr(reader.config, "max_position_embeddings", None)
        self.room = None if limit is None else limit - self.first_position

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model with positions that are moved on."""
        if "position_ids" not in self.names:
            return base(*args, **kwargs)
        values = dict(zip(self.names, args, strict=False)) | kwargs
        ids, embedded = values.get("input_ids"), values.get("inputs_embeds")
        source = embedded if ids is None else ids
        if source is None:  # the model says what it misses
            return base(**values)
        values["position_ids"] = self._positions(values, source.shape[1], source.device)
        return base(**values)

    def _positions(self, values: dict[str, Any], length: int, device: torch.device) -> Tensor:
        cache = values.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if self.room is not None and isinstance(past, int):
            require_room(self.n, past + length, self.room)
        given, mask = values.get("position_ids"), values.get("attention_mask")
        if given is not None:
            moved: Tensor = given + self.n
            return moved
        if isinstance(mask, Tensor) and mask.dim() == 2:
            counted = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        else:
            counted = (torch.arange(length, device=device) + past).unsqueeze(0)
        return counted + self.n + self.first_position


class PrefixedAttention(AdapterLayer):
    """Self-attention over ``[prefix; text]``, the prefix in sight of every token, a sliding window or not.

    Args:
        method: the method's name, for errors.
        module: the attention module.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, method: str, module: Module) -> None:
        super().__init__()
        self.method = method
        self.names = list(inspect.signature(module.forward).parameters)
        self.cache = next(n for n in _CACHES if n in self.names)
        self.mask = next((n for n in _MASKS if n in self.names), "attention_mask")

    def prefix(self) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values, ``(heads, n, head_dim)`` each."""
        raise NotImplementedError(f"{type(self).__name__} must define prefix()")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs attention with a wider mask and a cache that puts the prefix before what it gives."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        keys, content = self.prefix()
        module: Any = module_of(base)
        tokens = values[self.names[0]].shape[1]
        cache, mask = values.get(self.cache), values.get(self.mask)
        # sdpa makes a plain causal mask itself, and would begin it at the prefix
        unmasked = mask is None and tokens > 1 and getattr(module, "is_causal", True)
        values[self.mask] = self._widened(mask, keys.shape[1], tokens if unmasked else None, keys.device)
        cache = getattr(cache, "self_attention_cache", cache)
        values[self.cache] = _BehindPrefix(self.method, cache, keys, content, only_new=unmasked)
        return base(**values)

    def _widened(self, mask: Any, n: int, causal: int | None, device: torch.device) -> Tensor | None:
        """The mask with ``n`` columns in sight; ``(batch, heads, tokens, keys)`` -> ``(..., n + keys)``."""
        if causal is not None:
            rows = torch.ones(causal, n + causal, dtype=torch.bool, device=device)
            return rows.tril(n)[None, None]
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            what = f"a {tuple(mask.shape)} tensor" if isinstance(mask, Tensor) else an(type(mask).__name__)
            raise ValueError(
                f"{self.method} widens attention masks of (batch, heads, tokens, keys), but got {what}; load the "
                "model with attn_implementation='sdpa' or 'eager'"
            )
        return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


class _BehindPrefix:
    """One attention call's view of a cache, or of none: what it gives stands behind the prefix."""

    def __init__(self, method: str, cache: Any, keys: Tensor, values: Tensor, *, only_new: bool) -> None:
        self.method = method
        self.cache = cache
        self.prefix = (keys, values)
        self.only_new = only_new

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        n = self.prefix[0].shape[1]
        return n if self.cache is None else n + self.cache.get_seq_length(layer_idx)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = keys.shape[-2]
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        if self.only_new:  # a static cache has room behind the text
            keys, values = keys[..., :new, :], values[..., :new, :]
        return self._joined(self.prefix[0], keys), self._joined(self.prefix[1], values)

    def _joined(self, prefix: Tensor, text: Tensor) -> Tensor:
        """``(heads, n, dim)`` and ``(batch, heads, tokens, dim)`` -> ``(batch, heads, n + tokens, dim)``."""
        if prefix.shape[0] != text.shape[1] or prefix.shape[2] != text.shape[3]:
            raise ValueError(
                f"{self.method} made keys and values of {prefix.shape[0]} heads of {prefix.shape[2]} from the model's "
                f"configuration, but a layer has {text.shape[1]} of {text.shape[3]}: mixed layers are not supported"
            )
        return torch.cat([prefix.to(text).expand(len(text), -1, -1, -1), text], -2)
