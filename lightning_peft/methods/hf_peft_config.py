"""Configurations of Hugging Face PEFT as plain values and back, and what of them cannot run here."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Mapping
from typing import Any

from lightning_peft.core.problems import nearest, unknown_names

# what says where an adapter comes from and how it is run, not what it is
_NOT_OPTIONS = (
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "modules_to_save",
    "runtime_config",
)

_NO_NETWORK = "peft's file keeps what its network gives and not the network, so a run could not go on from it"

_KINDS_THAT_CANNOT_RUN = {
    "ADALORA": "it moves ranks between modules by calls between the optimizer's steps, which nothing here makes",
    "CPT": "it computes a loss of its own inside the model, from which tokens are instruction, input and answer",
    "P_TUNING": _NO_NETWORK,
    "SHADOW": "it runs a second network beside the model by hooks on it, not layers around modules",
    "XLORA": "it mixes LoRA adapters that peft has trained before and reads their folders; train LoRA here, and mix "
    "in peft",
}

_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")

# options that peft carries out on the model and not in a layer
_OPTIONS_ON_THE_MODEL = {
    "trainable_token_indices": "put an adapter of the kind TRAINABLE_TOKENS beside this one",
    "target_parameters": "it names parameters; name modules in target_modules",
    "layer_replication": "it changes the model's layers; replicate them before adapting",
    "alora_invocation_tokens": "it hooks the model's forward",
    "arrow_config": "it mixes adapters that peft has trained before",
    "monteclora_config": "its loss is added by peft's own trainer",
    "megatron_config": "it is for Megatron's parallel layers",
    "use_asa": "it chooses subspaces by calls between the optimizer's steps, which nothing here makes",
    "prefix_projection": _NO_NETWORK,
    "save_only_topk_weights": "what it saves cannot be trained on, so a run could not be resumed; leave it false",
}

# how a prompt starts, whose text, tokenizer or tensors peft reads from wherever a configuration says that they lie
_AT_RANDOM: dict[str, Any] = {
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "prompt_tuning_init_state_dict_path": None,
    "tokenizer_name_or_path": None,
    "tokenizer_kwargs": None,
}


def at_random(plain: dict[str, Any]) -> dict[str, Any]:
    """The same options, but for what a prompt starts from: random numbers, for which nothing is read.

    Args:
        plain: a configuration's options.
    """
    return {k: _AT_RANDOM.get(k, v) for k, v in plain.items()}


def plain_config(given: Any) -> tuple[dict[str, Any], list[str] | None]:
    """All options of a configuration in plain values.

    Args:
        given: a `peft.PeftConfig`, or a dictionary of options with ``peft_type``.

    Returns:
        The options, and what was named to train in full.

    Raises:
        ImportError: if ``peft`` is not installed.
        TypeError: if it is something else.
        ValueError: if the kind or an option is unknown to the installed ``peft``.
    """
    peft = _peft()
    if isinstance(given, peft.PeftConfig):
        config = given
    elif isinstance(given, Mapping):
        config = _made(dict(given))
    else:
        raise TypeError(f"HFPeft takes a peft.PeftConfig or a dictionary with 'peft_type', but got {given!r}")
    plain = {k: _plain(v) for k, v in config.to_dict().items()}
    saved = plain.get("modules_to_save")
    return {k: v for k, v in plain.items() if k not in _NOT_OPTIONS}, saved or None


def ready_config(plain: dict[str, Any]) -> Any:
    """The `peft.PeftConfig` with these options."""
    return _made(dict(plain))


def tuner_class(plain: dict[str, Any]) -> Any:
    """PEFT's class that puts layers of this kind into a model, or makes the prompts of it."""
    return _mapping("PEFT_TYPE_TO_TUNER_MAPPING")[plain["peft_type"]]


def knows(kind: str) -> bool:
    """Whether ``peft`` is installed and has tuners of that kind."""
    try:
        return kind in _mapping("PEFT_TYPE_TO_CONFIG_MAPPING")
    except ImportError:
        return False


def problems_of(plain: dict[str, Any]) -> list[str]:
    """Why these options cannot run here, a sentence each.

    Args:
        plain: as `plain_config` gives it.
    """
    kind = str(plain["peft_type"])
    found = []
    if kind in _KINDS_THAT_CANNOT_RUN:
        found.append(_why_not(kind))
    start = plain.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_STARTS):
        found.append(f"init_lora_weights={start!r} changes the base's weights{_native(kind)}")
    if plain.get("bias") not in (None, False, "none"):
        found.append(f"bias={plain['bias']!r} trains biases of the base{_native(kind)}")
    if plain.get("num_transformer_submodules") not in (None, 1):
        found.append("num_transformer_submodules=2 puts a prompt into the decoder too; only 1 is supported")
    found += [f"{o}={plain[o]!r}: {why}" for o, why in _OPTIONS_ON_THE_MODEL.items() if plain.get(o)]
    return found


def _why_not(kind: str) -> str:
    return f"{kind} cannot run here: {_KINDS_THAT_CANNOT_RUN[kind]}{_native(kind)}"


def _native(kind: str) -> str:
    """Where this package has a method of its own, its name."""
    methods = importlib.import_module("lightning_peft.methods")  # which imports this file
    classes: list[Any] = [getattr(methods, name) for name in methods.__all__]
    own = next((c.__name__ for c in classes if c.peft_type == kind), None)
    return "" if own is None else f"; this package has a method of its own, {own}"


def _made(options: dict[str, Any]) -> Any:
    kind = options.pop("peft_type", None)
    known = _mapping("PEFT_TYPE_TO_CONFIG_MAPPING")
    names = [k.value for k in known]
    kind = kind.value if isinstance(kind, enum.Enum) else kind
    if not isinstance(kind, str) or kind not in names:
        near = nearest(str(kind).upper(), names)
        raise ValueError(f"HFPeft: peft_type={kind!r} is none of the installed peft's{near}")
    if kind in _KINDS_THAT_CANNOT_RUN:  # before peft asks for options that would not help
        raise ValueError(f"HFPeft({kind}): {_why_not(kind)}")
    cls = known[kind]
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    unknown = [o for o in options if o not in (*fields, *_NOT_OPTIONS)]
    if unknown:
        raise ValueError(f"HFPeft: {kind} has no option {unknown_names(unknown, fields)}")
    left_out = [n for n in _NOT_OPTIONS if n != "modules_to_save"]
    return cls(**{k: v for k, v in options.items() if k in fields and k not in left_out})


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _mapping(name: str) -> Any:
    _peft()
    import peft.mapping

    return getattr(peft.mapping, name)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("HFPeft needs the package peft: pip install 'lightning-peft[hf]'") from error
    return peft
