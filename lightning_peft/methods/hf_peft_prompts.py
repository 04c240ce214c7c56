"""Prompts of Hugging Face PEFT, which wrap a whole model there: PEFT draws the tensors, layers of ours use them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.base import compute_dtype, module_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import base_modules, class_of
from lightning_peft.core.method import Placement
from lightning_peft.core.problems import an
from lightning_peft.core.twin import bare_twin
from lightning_peft.methods.hf_peft_layers import PEFT_NAME, TaskIds, task_ids_of_call
from lightning_peft.methods.reader import find_reader
from lightning_peft.methods.virtual_tokens import VirtualEmbedding, first_position, place_virtual_tokens

FROZEN = "frozen_embeddings"
"""The first rows of a prompt, where a kind leaves some as they are."""

PROMPT_TENSORS = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
"""The names of a prompt's tensors, which stand bare in a PEFT file."""


def place_prompt(model: Module, config: Any) -> Placement:
    """The layers of a prompt, which start with the numbers that PEFT draws.

    Args:
        model: the root, or something with exactly one language model in it.
        config: a `peft.PeftConfig` of a kind that learns a prompt.

    Raises:
        ValueError: if the model is not one for such a prompt.
    """
    name = f"HFPeft({config.peft_type.value})"
    host = find_reader(name, model).host
    place = next(n for n, m in base_modules(model).items() if m is host)
    config.num_transformer_submodules = 1
    config.task_type = "FEATURE_EXTRACTION"  # the kind for which PEFT looks for nothing in the model but its sizes
    tensors, trained = _tensors(name, host, config)
    table = tensors["prompt_embeddings"]
    n, frozen = config.num_virtual_tokens, getattr(config, "num_frozen_tokens", 0)
    if len(trained) > len(tensors) + bool(frozen):
        raise ValueError(
            f"{name}: peft's file keeps what a network gives and not the network, so a run could not go on from it; "
            "leave the network out (prefix_projection=False)"
        )
    if table.shape[1] != config.token_dim:
        return Placement({place: _Prefix(name, host, tensors, config)})
    placement = place_virtual_tokens(name, n, model, lambda _, embedding: _Vectors(tensors, device_for(embedding)))
    if len(tensors) > 1:  # what else there is belongs to the tasks
        placement.layers[place] = TaskIds(placement.layers.get(place))
    return placement


def _tensors(name: str, host: Module, config: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What PEFT's file of a fresh prompt holds, and all parameters of its encoder."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs: Any = peft.get_peft_model(bare_twin(host), config, PEFT_NAME)
            saved = peft.get_peft_model_state_dict(theirs)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        raise ValueError(f"{name}: peft says: {error}") from error
    return {k: t.detach().float().clone() for k, t in saved.items()}, list(theirs.prompt_encoder.parameters())


class _Vectors(VirtualEmbedding):
    """``prompt_embeddings: (n, hidden)``; by tasks, each times ``prefix_task_cols[task] @ prefix_task_rows[task]``.

    ``prefix_task_cols: (tasks, n, ranks)``, ``prefix_task_rows: (tasks, ranks, hidden)``.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.by_task = len(tensors) > 1
        for key, tensor in tensors.items():
            self.register_parameter(key, Parameter(tensor.to(device)))

    def vectors(self) -> Tensor:
        """All of them alike: ``(n, hidden)``; one set for each example with tasks: ``(batch, n, hidden)``."""
        table = self.get_parameter("prompt_embeddings")
        if not self.by_task:
            return table
        tasks = task_ids_of_call()
        if tasks is None:
            raise ValueError("this prompt differs by task: pass task_ids, the number of each example's task")
        return table * (self.get_parameter("prefix_task_cols")[tasks] @ self.get_parameter("prefix_task_rows")[tasks])

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Looks up the text and puts the trained vectors where the stand-ins are."""
        if not self.by_task:
            return super().forward(base, ids)
        embedded: Tensor = base(ids.clamp_min(0))
        virtual = self.vectors().to(embedded.dtype)
        places = (-ids - 1).clamp(0, virtual.shape[1] - 1).unsqueeze(-1).expand(-1, -1, virtual.shape[2])
        return torch.where((ids < 0).unsqueeze(-1), virtual.gather(1, places), embedded)


class _Prefix(AdapterLayer):
    """Keys and values before the text's in every layer: ``prompt_embeddings: (n, layers * 2 * heads * head size)``."""

    def __init__(self, name: str, host: Any, tensors: dict[str, Tensor], config: Any) -> None:
        super().__init__()
        self.names = list(inspect.signature(host.forward).parameters)
        if "past_key_values" not in self.names or host.config.is_encoder_decoder:
            raise ValueError(
                f"{name} fills the cache of a decoder, but {class_of(host).__name__} is none; choose another method"
            )
        self.name = name
        self.first_position = first_position(host)
        self.sizes = (config.num_layers * 2, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        device = device_for(host)
        frozen = getattr(config, "num_frozen_tokens", 0)
        table = tensors["prompt_embeddings"].to(device)
        self.prompt_embeddings = Parameter(table[frozen:].clone())
        self.frozen = frozen > 0
        if self.frozen:
            self.register_buffer(FROZEN, table[:frozen].clone())

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model on a filled cache; positions count on from the prompt."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        text: Any = values.get("inputs_embeds") if values.get("input_ids") is None else values["input_ids"]
        table = self._table()
        mask = values.get("attention_mask")
        positions = self._positions(values.pop("position_ids", None), mask, len(table), text.shape[1])
        if positions is not None:
            values["position_ids"] = positions
        if mask is not None:
            values["attention_mask"] = torch.cat([mask.new_ones(len(mask), len(table)), mask], 1)
        values.pop("cache_position", None)  # it does not count the prompt; the model counts from its cache
        cache = values.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            values["past_key_values"] = self._cache(base, cache, table, len(text))
        output = base(**values)
        if values.get("use_cache") is False and isinstance(output, Mapping):
            # given back, generate() would hand it to the next step, which reads the whole text again
            output = type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
        return output

    def _positions(self, given: Any, mask: Any, n: int, length: int) -> Tensor | None:
        """The text's, behind the prompt and without padding; None where the model's own count is right."""
        if "position_ids" not in self.names:
            return None
        if given is not None:
            moved: Tensor = given + n
            return moved
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        counted: Tensor = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
        return counted + n + self.first_position

    def _table(self) -> Tensor:
        return torch.cat([self.get_buffer(FROZEN), self.prompt_embeddings]) if self.frozen else self.prompt_embeddings

    def _cache(self, base: Callable[..., Any], given: Any, table: Tensor, batch: int) -> Any:
        from transformers import DynamicCache

        if given is not None and type(given) is not DynamicCache:
            raise ValueError(
                f"{self.name} fills a DynamicCache, but got {an(type(given).__name__)}; use a dynamic cache"
            )
        host: Any = module_of(base)
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in host.modules()):
            raise ValueError(f"{self.name} does not work with gradient checkpointing, which drops the cache")
        dtype = compute_dtype(base) or table.dtype
        doubled, heads, size = self.sizes
        # (n, layers * 2, heads, size) -> layers * 2 of (batch, heads, n, size): keys and values take turns
        slots = table.to(dtype).view(len(table), doubled, heads, size).permute(1, 2, 0, 3).unsqueeze(1)
        slots = slots.expand(-1, batch, -1, -1, -1)
        return DynamicCache([(slots[i], slots[i + 1]) for i in range(0, doubled, 2)])
