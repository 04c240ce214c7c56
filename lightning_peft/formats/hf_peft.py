"""The names and fields of Hugging Face PEFT's adapter files."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

import lightning_peft.methods as methods
from lightning_peft.core.matching import class_of
from lightning_peft.core.method import Method, PeftFormat
from lightning_peft.core.patterns import refuse_slow_patterns
from lightning_peft.core.tree import Record
from lightning_peft.methods.hf_peft_config import knows

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def has_peft_format(method: Method) -> bool:
    """Whether Hugging Face PEFT knows the method."""
    return method.peft_type is not None and isinstance(method, PeftFormat)


def adapter_config(model: Module, record: Record, base: dict[str, Any]) -> dict[str, Any]:
    """What goes into ``adapter_config.json``.

    Args:
        model: the adapted model.
        record: the adapter's record.
        base: the base's ``name`` and ``revision``.

    Returns:
        The fields; keys are sorted when written.
    """
    method = record.method
    assert isinstance(method, PeftFormat)
    return {
        "peft_type": record.method.peft_type,
        "task_type": _task_type(model, record),
        "base_model_name_or_path": base["name"],
        "revision": base["revision"],
        "inference_mode": True,
        # not every class of PEFT's has the field, and one that has it takes its absence for None
        **({"modules_to_save": record.copies} if record.copies else {}),
        **method.peft_config(model, record.layers),
    }


def _task_type(model: Module, record: Record) -> str | None:
    name = class_of(model).__name__
    kind = next((t for ending, t in _TASK_TYPES.items() if name.endswith(ending)), None)
    if kind in ("SEQ_CLS", "TOKEN_CLS") and not record.copies and not _is_prompt(record):
        # With this type peft takes a trained classifier for granted and fails where the file has none
        return None
    if kind is None and _is_prompt(record):
        # Without a type peft's model loads the prompt and never puts it before the text
        return "FEATURE_EXTRACTION"
    return kind


def _is_prompt(record: Record) -> bool:
    options = vars(record.method)
    return "num_virtual_tokens" in options or "num_virtual_tokens" in options.get("config", {})


def method_from_peft(config: dict[str, Any]) -> Method:
    """The method that an ``adapter_config.json`` describes.

    Args:
        config: the file's content.

    Raises:
        ValueError: if the method, or an option that it uses, is not supported.
    """
    classes: list[Any] = [getattr(methods, name) for name in methods.__all__]
    known = {cls.peft_type: cls for cls in classes if isinstance(cls.peft_type, str)}
    refuse_slow_patterns(config)
    kind = config.get("peft_type")
    if kind is None:
        raise ValueError(
            "it names no peft_type, so it is not Hugging Face PEFT's (AdapterHub uses the same "
            "file name); expected one of " + ", ".join(sorted(known))
        )
    if not isinstance(kind, str) or kind not in known:
        if isinstance(kind, str) and knows(kind):
            return methods.HFPeft.from_peft_config(config)
        raise ValueError(
            f"adapters of the kind {kind!r} are not supported; expected one of {sorted(known)}, or a kind of the "
            "package peft where that is installed: pip install 'lightning-peft[hf]'"
        )
    made: Method = known[kind].from_peft_config(config)
    return made
