"""A base in 4 bits without numbers: bitsandbytes' own layers, over codes and scales that have shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from lightning_peft.core.imitation import numbers
from lightning_peft.tasks.quantization import quantization_config

_SHARING = 256  # scales that share one themselves, where they are quantized too; bitsandbytes has no other number


def takes_4_bits(given: Any) -> bool:
    """Whether the option ``quantization`` stands for bitsandbytes' 4 bits.

    Args:
        given: what the user gave.
    """
    return given == "nf4" or (isinstance(given, dict) and bool(given.get("load_in_4bit")))


def imitate_4_bits(model: Module, given: Any, compute_dtype: torch.dtype | None) -> None:
    """Puts bitsandbytes' layers where ``from_pretrained`` would, but for what the checkpoint lacks.

    Args:
        model: a Hugging Face model without numbers, in whose parameters is noted what is new.
        given: the option ``quantization``, for which `takes_4_bits` holds.
        compute_dtype: the dtype in which the layers multiply; None is float32.
    """
    import transformers
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(given, compute_dtype or torch.float32)
    if isinstance(config, dict):
        config = transformers.BitsAndBytesConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    before = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    with numbers():  # what it makes lies on the meta device
        AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model=model, device_map={"": "cpu"})
    for name, plain in before.items():
        layer: Any = model.get_submodule(name)
        if layer is plain:
            continue
        if getattr(plain.weight, "_is_hf_initialized", True):
            layer._parameters["weight"] = _codes(plain.weight, config)
            layer._parameters["bias"] = plain.bias
        else:
            model.set_submodule(name, plain)


def _codes(weight: Tensor, config: Any) -> Parameter:
    from bitsandbytes import functional

    make: Any = functional.QuantState

    count = weight.numel()
    storage = config.bnb_4bit_quant_storage
    made = Parameter(torch.empty(-(-count // (2 * storage.itemsize)), 1, dtype=storage), requires_grad=False)
    scales, state, offset = -(-count // 64), None, None
    if config.bnb_4bit_use_double_quant:
        of_scales, offset = torch.empty(-(-scales // _SHARING)), torch.empty(())
        state = make(absmax=of_scales, code=torch.empty(256), blocksize=_SHARING, dtype=torch.float32)
    known: Any = made
    known.quant_state = make(
        absmax=torch.empty(scales, dtype=torch.float32 if state is None else torch.uint8),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type=config.bnb_4bit_quant_type,
        dtype=torch.float32,  # of the checkpoint's weights, as they are loaded
        offset=offset,
        state2=state,
    )
    known._is_hf_initialized = True
    return made
