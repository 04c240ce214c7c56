"""Adapters for those who serve them: what vLLM and llama.cpp cannot read is refused before anything is written.

Both read plain LoRA on linear layers and ignore without a word what they do not know: vLLM the patterns of ranks and
strengths, llama.cpp's converter rsLoRA too. What can be said in their terms is converted: ``s_i B_i A_i`` of rank
``r_i`` is ``s (s_i / s) B_i A_i`` of any higher rank, with zeros behind.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from lightning_peft.core.adapters import tree_of
from lightning_peft.core.matching import class_of
from lightning_peft.core.problems import an, nearest, raise_problems
from lightning_peft.core.tree import Record
from lightning_peft.formats.base_identity import base_description
from lightning_peft.formats.card import Card
from lightning_peft.formats.folder import (
    PEFT_CONFIG,
    file_tensors,
    refuse_occupied,
)
from lightning_peft.formats.hf_peft import adapter_config
from lightning_peft.formats.tensor_file import TENSORS, write_tensors
from lightning_peft.formats.writing import write_json, written_whole
from lightning_peft.methods.linear import is_linear
from lightning_peft.methods.lora import LoRA

DEFAULT_MAX_LORA_RANK = 16
"""With which vLLM starts unless it is told otherwise."""


@dataclass(frozen=True)
class Consumer:
    """What reads the files, and where its terms differ.

    Attributes:
        title: its name in sentences.
        knows_rslora: whether it reads ``use_rslora``; else ``alpha / r`` is taken whatever the file says.
        limits_rank: whether it refuses ranks above a number that it is started with.
        needs_base_name: whether it looks for the base's config under the name in the file.
    """

    title: str
    knows_rslora: bool
    limits_rank: bool
    needs_base_name: bool


CONSUMERS = {
    "vllm": Consumer("vLLM", knows_rslora=True, limits_rank=True, needs_base_name=False),
    "gguf": Consumer("llama.cpp's converter", knows_rslora=False, limits_rank=False, needs_base_name=True),
}


def consumer_of(name: str, max_lora_rank: int = DEFAULT_MAX_LORA_RANK) -> Consumer:
    """The consumer of that name, once what is known of it has been checked.

    Args:
        name: ``"vllm"`` or ``"gguf"``.
        max_lora_rank: the highest rank that the vLLM server is started for, 1 or more.

    Raises:
        ValueError: if it is another name, or the rank is no whole number of 1 or more.
    """
    if name not in CONSUMERS:
        raise ValueError(f"for={name} is unknown{nearest(str(name), CONSUMERS)}")
    if not isinstance(max_lora_rank, int) or isinstance(max_lora_rank, bool) or max_lora_rank < 1:
        raise ValueError(f"max_lora_rank must be a whole number of 1 or more, but got {max_lora_rank!r}")
    return CONSUMERS[name]


def check_for(
    consumer: str, model: Module, name: str = "default", *, max_lora_rank: int = DEFAULT_MAX_LORA_RANK
) -> None:
    """Refuses an adapter that a consumer could not read, or would read as another one.

    Args:
        consumer: ``"vllm"`` or ``"gguf"``.
        model: the adapted model.
        name: the adapter's name.
        max_lora_rank: the highest rank that the vLLM server is started for, 1 or more.

    Raises:
        ValueError: if the consumer is unknown or cannot hold the adapter, with all reasons and what to do instead.
    """
    reader, record = consumer_of(consumer, max_lora_rank), tree_of(model, name).record
    method = record.method
    # methods that can be merged still have a way
    instead = "export a merged model instead (format=merged)" if method.mergeable else "serve it with transformers"
    subject = f"for={consumer}"
    if not isinstance(method, LoRA):
        raise ValueError(f"{subject}: {reader.title} reads LoRA alone, and {type(method).__name__} is none; {instead}")
    lacks = [*_beyond_lora(model, method, record), *_in_full(record)]
    rank = rank_in_file(model, name)
    unnamed = reader.needs_base_name and base_description(model, [name])["name"] is None
    raise_problems(
        subject,
        [
            f"{reader.title} reads plain LoRA on linear layers, but here is {', '.join(lacks)}; {instead}"
            if lacks
            else None,
            f"the rank in the file is {rank}{_why(method)}, above max_lora_rank={max_lora_rank}; start the server with "
            f"--max-lora-rank {served_rank(rank)} and pass max_lora_rank={served_rank(rank)}, or {instead}"
            if reader.limits_rank and rank > max_lora_rank
            else None,
            f"{reader.title} looks for the base's config under the name in adapter_config.json, but this base has "
            "none; load it with from_pretrained(name or folder)"
            if unnamed
            else None,
        ],
    )


def rank_in_file(model: Module, name: str) -> int:
    """The highest rank of a LoRA as files hold it; 0 of another adapter.

    Args:
        model: the adapted model.
        name: the adapter's name.
    """
    tensors = file_tensors(model, tree_of(model, name))
    return max((len(t) for k, t in tensors.items() if k.endswith("lora_A.weight")), default=0)


def save_for(
    consumer: str,
    model: Module,
    name: str,
    path: Path,
    *,
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK,
    card: Card | None = None,
) -> Path:
    """Writes an adapter as a consumer reads it: a plain LoRA of one rank and one strength.

    Args:
        consumer: ``"vllm"`` or ``"gguf"``.
        model: the adapted model.
        name: the adapter's name.
        path: the folder; it holds Hugging Face's two files and, beside them, the card alone.
        max_lora_rank: the highest rank that the vLLM server is started for, 1 or more.
        card: its model card.

    Returns:
        The folder.

    Raises:
        ValueError: if the consumer cannot hold the adapter; nothing is written then.
        FileExistsError: if the folder already holds an adapter.
    """
    check_for(consumer, model, name, max_lora_rank=max_lora_rank)
    refuse_occupied(path)
    tree = tree_of(model, name)
    config = adapter_config(model, tree.record, base_description(model, [name]))
    tensors = {k: t.detach().cpu() for k, t in file_tensors(model, tree).items()}
    method = tree.record.method
    assert isinstance(method, LoRA)
    scales = {f"base_model.model.{n}": method.scale(n) for n in tree.record.layers}
    ranks = {place: len(tensors[f"{place}.lora_A.weight"]) for place in scales}
    foreign = config["use_rslora"] and not consumer_of(consumer).knows_rslora
    said = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    own = any(not math.isclose(s, said) for s in scales.values()) or set(ranks.values()) != {config["r"]}
    if foreign or own:
        config, tensors = _of_one_rank(config, tensors, scales, max(ranks.values()))
    # the patterns say nothing any more: whatever they say is what all modules have
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    with written_whole(path, last=(TENSORS, PEFT_CONFIG)) as scratch:
        write_tensors(scratch, tensors)
        write_json(scratch / PEFT_CONFIG, config)
        if card is not None:
            card.write(scratch, beside=path)
    return path


def _of_one_rank(
    config: dict[str, Any], tensors: dict[str, Tensor], scales: dict[str, float], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same changes with one rank and one strength, that of most modules, and without rsLoRA."""
    ((scale, _),) = Counter(scales.values()).most_common(1)
    padded: dict[str, Tensor] = {}
    for place, own in scales.items():
        a, b = tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
        more = rank - len(a)
        padded[f"{place}.lora_A.weight"] = F.pad(a, (0, 0, 0, more))
        padded[f"{place}.lora_B.weight"] = F.pad(b * (own / scale), (0, more))
    alpha = scale * rank
    return {**config, "r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "use_rslora": False}, padded


def _beyond_lora(model: Module, method: LoRA, record: Record) -> list[str]:
    given = {
        "DoRA (use_dora)": method.use_dora,
        "a bias (lora_bias)": method.lora_bias,
        f"trained biases (bias={method.bias})": method.bias != "none",
    }
    found = [k for k, v in given.items() if v]
    for place in record.layers:
        module = model.get_submodule(place)
        if not is_linear(module):
            # one of a kind is enough to say it
            return [*found, f"a layer on {place!r}, {an(class_of(module).__name__)}"]
    return found


def _in_full(record: Record) -> list[str]:
    # biases that the method trains are named as such
    biases = isinstance(record.method, LoRA) and record.method.bias != "none"
    trained = [*record.copies, *(n for n in record.in_place if not (biases and n.endswith("bias")))]
    return [f"{n!r}, trained in full" for n in trained[:2]]


def _why(method: LoRA) -> str:
    return " (twice that of the method: what it starts with is subtracted)" if method.starts_apart else ""


def served_rank(rank: int) -> int:
    """The next of the ranks that vLLM can be started for.

    Args:
        rank: of the adapter.
    """
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
