"""A base that is loaded quantized: the usual ways by name, and transformers' configuration for any other."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from lightning_peft.core.problems import nearest
from lightning_peft.core.quantized import is_quantized, note_full
from lightning_peft.tasks.weight_files import Stored, WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_weight_only": "torchao"}
"""The names that ``model.quantization`` takes, and the package that each needs."""


def quantization_problem(given: Any) -> str | None:
    """What is wrong with the option ``quantization``, as a sentence; None if nothing is.

    Args:
        given: what the user gave.
    """
    if given is None:
        return None
    methods = sorted(set(WAYS.values()))
    if isinstance(given, dict):
        package = given.get("quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & given.keys() else None)
        if package not in methods:
            near = nearest(str(package), methods)
            return f"quantization must say its quant_method, {' or '.join(methods)}, but got {package!r}{near}"
        if package == "bitsandbytes" and given.get("load_in_4bit") is given.get("load_in_8bit"):
            return "quantization with bitsandbytes must say load_in_4bit or load_in_8bit, one of them true"
        kind = given.get("bnb_4bit_quant_type", "nf4")
        if kind not in ("nf4", "fp4"):
            return f"quantization: bnb_4bit_quant_type must be 'nf4' or 'fp4', but got {kind!r}"
    elif given in WAYS:
        package = WAYS[given]
    else:
        names = ", ".join(map(repr, WAYS))
        near = nearest(str(given), WAYS)
        return f"quantization must be {names}, or a dictionary with its quant_method, but got {given!r}{near}"
    if importlib.util.find_spec(package) is None:
        return f"quantization={given} needs {package}: pip install 'lightning-peft[quantization]'"
    return None


def quantization_config(given: str | dict[str, Any], compute_dtype: torch.dtype) -> Any:
    """What transformers' ``from_pretrained`` takes for it.

    Args:
        given: one of `WAYS`, or a dictionary, which is taken as it is.
        compute_dtype: the dtype in which layers with 4-bit weights are to multiply.
    """
    import transformers

    if given == "nf4":
        # QLoRA (arXiv 2305.14314, 3): 4-bit NormalFloat, the blocks' scales quantized too
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if given == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if given == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return given


def plain_where_new(model: Module) -> None:
    """Puts PyTorch's own linear layers where bitsandbytes' hold weights that it did not quantize.

    So it is where the checkpoint had none for a layer, such as a new head: they were drawn, and are to train.

    Args:
        model: as ``from_pretrained`` gave it.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    for name, module in list(model.named_modules()):
        known = isinstance(module, Linear) and type(module).__module__.startswith("bitsandbytes.")
        if known and type(module.weight) is Parameter:
            plain = Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, plain)
    if hasattr(config, "llm_int8_skip_modules"):
        # who loads it again, merged, is to leave the same layers as they are
        linear = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
        config.llm_int8_skip_modules = sorted(n for n, m in linear.items() if not is_quantized(m.weight))


def note_full_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Notes on each quantized weight where its numbers before quantization lie, for starts that make up for its loss.

    Nothing is read yet. Weights that the folder has under another name, or in no safetensors file, are left out.

    Args:
        model: a quantized model.
        folder: the folder that it was loaded from.
    """
    files = WeightFiles(folder, model)
    for place, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not is_quantized(weight):
            continue
        stored = files.find(f"{place}.weight")
        if stored is not None:
            # layers that transformers turned when it quantized them, such as GPT-2's, say what they were
            turned = getattr(module, "source_cls", Linear).__name__ == "Conv1D"
            note_full(weight, partial(_read, stored, turned=turned))


def _read(stored: Stored, *, turned: bool) -> Tensor:
    tensor = stored.read()
    return tensor.T if turned else tensor
