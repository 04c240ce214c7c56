"""How to load what was exported: here, with Hugging Face PEFT, as a merged model; code that runs as it stands."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from lightning_peft.formats.hf_peft import has_peft_format
from lightning_peft.formats.markdown import block, code

if TYPE_CHECKING:
    from lightning_peft.formats.card import CardFacts


def loading_section(facts: CardFacts) -> str:
    """The section on loading.

    Args:
        facts: what is known.
    """
    if facts.form == "merged":
        return "\n\n".join(["## How to load it", _plain(facts)])
    ways = [_served(facts), _here(facts), _peft(facts), _merged(facts)]
    return "\n\n".join(["## How to load it", *(way for way in ways if way)])


def _quoted(value: Any) -> str:
    """A value as it stands in code, texts in double quotes."""
    if isinstance(value, str):
        # what is not seen stays escaped: such as marks that turn the direction of writing
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_quoted(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _base(facts: CardFacts, variable: str) -> list[str]:
    """Lines that load the base, without those that import; none where only its owner knows how."""
    loader, called = facts.model.loader, facts.base_called
    if loader is None or called is None:
        return []
    given: dict[str, Any] = {**facts.model.options, **(facts.info.get("model") or {}).get("config", {})}
    if facts.base_on_hub and facts.base["revision"]:
        given = {"revision": facts.base["revision"], **given}
    if facts.base["codes"] and facts.base["quantization"]:
        given["quantization_config"] = facts.base["quantization"]
    words = "".join(f", {k}={_quoted(v)}" for k, v in given.items() if k.isidentifier())
    note = "" if facts.base_on_hub else "  # the folder of the base"
    return [f"{variable} = {loader}.from_pretrained({_quoted(called)}{words}){note}"]


def _unloaded(facts: CardFacts) -> str:
    return "" if _base(facts, "model") else f"`model` is the base as it was adapted, a {code(facts.model.name)}:\n\n"


def _on_base(facts: CardFacts, base: list[str], imported: str, call: str) -> str:
    """Code that loads the base, or takes it as given, and puts the adapter on it."""
    loader = [f"from transformers import {facts.model.loader}"] if base else []
    return _unloaded(facts) + block(imported, *loader, "", *base, call)


def _knows_its_base(facts: CardFacts) -> bool:
    """Whether the folder says all that `PeftModule` needs."""
    return facts.form == "adapter" and {"task", "model"} <= facts.info.keys()


def _here(facts: CardFacts) -> str:
    if _knows_its_base(facts):
        note = "" if facts.base_on_hub else "  # model=... if the base's folder has moved"
        lines = [
            "from lightning_peft import PeftModule",
            "",
            f"module = PeftModule.from_adapter({_quoted(facts.folder)}){note}",
        ]
        return "### Here\n\n" + block(*lines)
    call = f"adapter = load_adapter(model, {_quoted(facts.folder)})"
    return "### Here\n\n" + _on_base(facts, _base(facts, "model"), "from lightning_peft import load_adapter", call)


def _peft(facts: CardFacts) -> str:
    if not has_peft_format(facts.method):
        return (
            "### With Hugging Face PEFT\n\nPEFT does not know this method, so the folder is in lightning_peft's own "
            "form and loads here alone."
        )
    base = _base(facts, "base")
    call = f"model = PeftModel.from_pretrained({'base' if base else 'model'}, {_quoted(facts.folder)})"
    return "### With Hugging Face PEFT\n\n" + _on_base(facts, base, "from peft import PeftModel", call)


def _merged(facts: CardFacts) -> str:
    heading = "### Merged, as a plain model\n\n"
    if not facts.method.mergeable:
        return heading + "This method does more than change weights, so it cannot be merged into the base."
    base = _base(facts, "model")
    loader, target = facts.model.loader, f"{facts.folder}-merged"
    lines = []
    if _knows_its_base(facts):
        lines += ["from lightning_peft import PeftModule", f"from transformers import {loader}", ""]
        lines += [f"merged = PeftModule.from_adapter({_quoted(facts.folder)}).adapter.merge_and_unload()"]
    else:
        lines += ["from lightning_peft import load_adapter"]
        lines += [f"from transformers import {loader}"] if loader else []
        lines += ["", *base, f"merged = load_adapter(model, {_quoted(facts.folder)}).merge_and_unload()"]
    if loader:
        lines += [f"merged.save_pretrained({_quoted(target)})", f"plain = {loader}.from_pretrained({_quoted(target)})"]
    unloaded = "" if _knows_its_base(facts) else _unloaded(facts)
    return heading + unloaded + block(*lines)


def _plain(facts: CardFacts) -> str:
    lines = [f"from transformers import {', '.join(sorted(filter(None, (facts.model.loader, facts.prepares))))}", ""]
    lines += [f"model = {facts.model.loader}.from_pretrained({_quoted(facts.folder)})"]
    if facts.prepares is not None:
        variable = "tokenizer" if facts.prepares == "AutoTokenizer" else "processor"
        lines += [f"{variable} = {facts.prepares}.from_pretrained({_quoted(facts.folder)})"]
    return block(*lines)


def _served(facts: CardFacts) -> str:
    if facts.form == "gguf":
        words = ["python", "convert_lora_to_gguf.py", facts.folder]
        return "### With llama.cpp\n\n" + block(shlex.join(words), language="bash")
    if facts.form == "vllm" and facts.base_called is not None:
        rank = ["--max-lora-rank", str(facts.max_lora_rank)] if facts.max_lora_rank else []
        modules = ["--lora-modules", f"{facts.folder}={facts.folder}"]
        words = ["vllm", "serve", facts.base_called, "--enable-lora", *rank, *modules]
        return "### With vLLM\n\n" + block(shlex.join(words), language="bash")
    return ""
