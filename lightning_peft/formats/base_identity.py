"""Which base a saved adapter belongs to, and whether a model is that base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch.nn import Embedding, Module

from lightning_peft.core.adapters import require_adapters
from lightning_peft.core.changed_weights import joined
from lightning_peft.core.fingerprint import fingerprint, same_structure, saved_parameters
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.matching import base_modules
from lightning_peft.core.method import Residual
from lightning_peft.core.quantized import is_quantized


def base_description(model: Module, names: Iterable[str]) -> dict[str, Any]:
    """The base's name, revision and fingerprint, and what that leaves out, in plain values.

    It leaves out what is saved beside it, and quantized weights, whose numbers are rounded: an adapter that was trained
    on a quantized base fits the base as it was, or quantized in another way, unless it holds what rounding has lost.

    Args:
        model: the adapted model.
        names: the adapters that are saved.
    """
    config = getattr(model, "config", None)
    adapters = require_adapters(model, names := list(names))
    methods = [adapters.trees[name].record.method for name in names]
    bound = any(isinstance(method, Residual) and method.needs_codes for method in methods)
    without, quantized = saved_parameters(adapters, names), [] if bound else _quantized(model)
    return {
        "name": getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": fingerprint(adapters.base_digests, [*without, *quantized]),
        "without": without,
        "quantized": quantized,
        "quantization": _configuration(config),
        "beside": fingerprint(adapters.base_digests, _quantizable(model, adapters.base_digests, without)),
        "codes": bound,
    }


def _configuration(config: Any) -> dict[str, Any] | None:
    """How transformers quantized the model, in plain values."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    # its names are members of an enumeration, which a checkpoint of plain containers cannot hold
    whole = given if isinstance(given, dict) else given.to_dict()
    changed = given.to_diff_dict() if hasattr(given, "to_diff_dict") else whole
    plain: dict[str, Any] = json.loads(json.dumps({"quant_method": whole.get("quant_method"), **changed}))
    return {k: v for k, v in plain.items() if not k.startswith("_")}


def _quantizable(model: Module, digests: Iterable[str], without: Iterable[str]) -> list[str]:
    """The parameters that a quantizer may have rounded, and others to be left out: all but vectors and embeddings."""
    kept = {
        joined(place, key)
        for place, module in base_modules(model).items()
        for key, parameter in module._parameters.items()
        if parameter is not None and (parameter.dim() == 1 or isinstance(module, Embedding))
    }
    kept -= set(without)
    return [n for n in digests if n not in kept]


def _quantized(model: Module) -> list[str]:
    return sorted(n for n, p in base_parameters(model).items() if is_quantized(p))


def refuse_another_base(model: Module, base: dict[str, Any], made: str) -> None:
    """Compares a saved adapter's base with the model that is to take it.

    Args:
        model: the model, adapted.
        base: as `base_description` gave it.
        made: what was made on which base, for the error, such as ``"the checkpoint was made"``.

    Raises:
        ValueError: if the base is another one.
    """
    digests = require_adapters(model).base_digests
    if not base["codes"] and set(_quantized(model)) - set(base["quantized"]):
        # the fingerprint says what the numbers were before they were rounded
        saved, mine = base["beside"], fingerprint(digests, _quantizable(model, digests, base["without"]))
    else:
        saved, mine = base["fingerprint"], fingerprint(digests, [*base["without"], *base["quantized"]])
    if saved is None or mine is None or saved == mine:
        return
    named = f"{base['name']} with " if base["name"] else ""
    lost = [n for n in base["without"] if n not in digests]
    if base["codes"]:
        why = (
            "the adapter holds what quantizing that base has lost: load the same weights, quantized in the same way "
            "(model.quantization)"
        )
    elif same_structure(saved, mine):
        why = (
            "names and shapes agree, values do not: load the same weights; what starts at random values each time, "
            "such as a head, has to be trained and saved (modules_to_save)"
        )
    else:
        why = "names or shapes differ: build the model with the same sizes, and adapt the same part of it"
        why += f"; {lost[0]!r}, which is trained in full there, does not exist here" if lost else ""
    raise ValueError(f"{made} on another base: {named}fingerprint {saved}, but this model has {mine}; {why}")
