"""Which base a saved adapter belongs to, and whether a model is that base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Iterable
from typing import Any, cast

from torch.nn import Embedding, Module, Parameter

from lightning_peft.core.adapters import require_adapters
from lightning_peft.core.changed_weights import joined
from lightning_peft.core.fingerprint import fingerprint, fingerprints_of_parts, same_structure, saved_parameters
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.matching import base_modules
from lightning_peft.core.method import Residual
from lightning_peft.core.options import misfits
from lightning_peft.core.quantized import is_quantized

_KEYS: dict[str, Any] = {
    "name": str | None,
    "revision": str | None,
    "fingerprint": str | None,
    "parts": dict[str, str],
    "dtypes": list[str],
    "vocabulary": int | None,
    "without": list[str],
    "quantized": list[str],
    "quantization": dict[str, Any] | None,
    "beside": str | None,
    "codes": bool,
}
_SHOWN = 3


def base_description(model: Module, names: Iterable[str]) -> dict[str, Any]:
    """The base's name, revision, fingerprint, dtypes and vocabulary, and what the fingerprint leaves out.

    All are plain values. Dtypes are no part of the fingerprint: the same base in bfloat16 or float32 is the same base.
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
    without, parameters = saved_parameters(adapters, names), base_parameters(model)
    quantized = [] if bound else _quantized(parameters)
    return {
        "name": getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": fingerprint(adapters.base_digests, [*without, *quantized]),
        "parts": fingerprints_of_parts(adapters.base_digests, [*without, *quantized]),
        "dtypes": _dtypes(parameters),
        "vocabulary": vocabulary(model),
        "without": without,
        "quantized": quantized,
        "quantization": _configuration(config),
        "beside": fingerprint(adapters.base_digests, _quantizable(model, adapters.base_digests, without)),
        "codes": bound,
    }


def check_description(base: Any) -> dict[str, Any]:
    """A base's description as a file holds it, once it has been seen to be one.

    Args:
        base: what the file says.

    Raises:
        ValueError: if something is missing, or of another type.
    """
    wrong = misfits(base, _KEYS) if isinstance(base, dict) else list(_KEYS)
    if wrong:
        raise ValueError(f"what it says of the base has no {', '.join(wrong)}, or something else there")
    return cast(dict[str, Any], base)


def vocabulary(model: Module) -> int | None:
    """How many tokens a Hugging Face model's input embedding has rows for; None where there is none.

    Args:
        model: the model, adapted or not.
    """
    try:
        embedding = cast(Any, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, Embedding) else None


def refuse_another_vocabulary(model: Module, base: dict[str, Any], made: str) -> None:
    """Refuses a model with more or fewer tokens than the one that an adapter was trained on.

    Args:
        model: the model, adapted or not.
        base: as `base_description` gave it.
        made: what was made on which base, for the error.

    Raises:
        ValueError: if it has, with the line to write.
    """
    rows, had = vocabulary(model), base["vocabulary"]
    if rows is not None and had is not None and rows != had:
        raise ValueError(
            f"{made} on a vocabulary of {had} tokens, but this model's has {rows}: write "
            f"model.resize_token_embeddings({had}) before the adapter is loaded; check_base=False goes on nevertheless"
        )


def restore_vocabulary(model: Module, base: dict[str, Any], sizes: Container[int]) -> None:
    """Gives a freshly loaded model the number of tokens that it was enlarged to before an adapter was trained.

    Args:
        model: a Hugging Face model.
        base: as `base_description` gave it.
        sizes: how many rows the adapter's tensors have. Where none has one a token, the rows are not in the file.
    """
    had = base["vocabulary"]
    if had is not None and had in sizes and had != vocabulary(model):
        cast(Any, model).resize_token_embeddings(had, mean_resizing=False)  # their values are in the file


def _dtypes(parameters: dict[str, Parameter]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in {p.dtype for p in parameters.values()})


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


def _quantized(parameters: dict[str, Parameter]) -> list[str]:
    return sorted(n for n, p in parameters.items() if is_quantized(p))


def refuse_another_base(model: Module, base: dict[str, Any], made: str) -> None:
    """Compares a saved adapter's base with the model that is to take it.

    Where values cannot be read, here or where it was saved, the layers decide that were read on both sides, and a
    warning says that the rest is not compared.

    Args:
        model: the model, adapted.
        base: as `base_description` gave it.
        made: what was made on which base, for the error, such as ``"the checkpoint was made"``.

    Raises:
        ValueError: if the base is another one.
    """
    digests = require_adapters(model).base_digests
    refuse_another_vocabulary(model, base, made)
    rounded = not base["codes"] and bool(set(_quantized(base_parameters(model))) - set(base["quantized"]))
    if rounded:
        # the fingerprint says what the numbers were before they were rounded
        saved, mine = base["beside"], fingerprint(digests, _quantizable(model, digests, base["without"]))
    else:
        saved, mine = base["fingerprint"], fingerprint(digests, [*base["without"], *base["quantized"]])
    named = f"{base['name']} with " if base["name"] else ""
    if saved is None or mine is None:
        parts = [] if rounded else _known_to_differ(model, base)
        if parts:
            said = f"{made} on another base: {named}other values or shapes in {_first(parts)}; load the same weights"
            raise ValueError(f"{said}; check_base=False loads it nevertheless")
        whose = "this model has" if mine is None else "the model that it was saved from had"
        said = f"{whose} values that cannot be read (offloaded, or on the meta device)"
        warnings.warn(
            f"{made} on a base of which not all is compared with this model: {said}; see to it that they are the same",
            stacklevel=3,
        )
        return
    if saved == mine:
        return
    said = f"{made} on another base: {named}fingerprint {saved}, but this model has {mine}"
    raise ValueError(f"{said}; {_why(model, base, saved, mine)}; check_base=False loads it nevertheless")


def _why(model: Module, base: dict[str, Any], saved: str, mine: str) -> str:
    """What differs, and what to do about it."""
    if base["codes"]:
        return (
            "the adapter holds what quantizing that base has lost: load the same weights, quantized in the same way "
            "(model.quantization)"
        )
    digests = require_adapters(model).base_digests
    where = _differing(base["parts"], fingerprints_of_parts(digests, [*base["without"], *base["quantized"]]))
    if not same_structure(saved, mine):
        lost = [n for n in base["without"] if n not in digests]
        why = f"names or shapes differ{where}: build the model with the same sizes, and adapt the same part of it"
        return why + (f"; {lost[0]!r}, which is trained in full there, does not exist here" if lost else "")
    dtypes = _dtypes(base_parameters(model))
    rounded = f", which was {' and '.join(base['dtypes'])} there and is {' and '.join(dtypes)} here"
    return (
        f"names and shapes agree, values do not{where}{rounded if dtypes != base['dtypes'] else ''}: load the same "
        "weights; what starts at random values each time, such as a head, has to be trained and saved (modules_to_save)"
    )


def _known_to_differ(model: Module, base: dict[str, Any]) -> list[str]:
    """The parts that were read on both sides and differ."""
    digests = require_adapters(model).base_digests
    here = fingerprints_of_parts(digests, [*base["without"], *base["quantized"]])
    return [p for p in sorted(base["parts"].keys() & here.keys()) if base["parts"][p] != here[p]]


def _differing(saved: dict[str, str], mine: dict[str, str]) -> str:
    """The parts that differ, as the middle of a sentence."""
    parts = [p for p in sorted(saved.keys() | mine.keys()) if saved.get(p) != mine.get(p)]
    if not parts or len(parts) == len(saved.keys() | mine.keys()):
        return ""
    return f" in {_first(parts)}"


def _first(parts: list[str]) -> str:
    return ", ".join(parts[:_SHOWN]) + (f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")
