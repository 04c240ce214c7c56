"""The model card: README.md with a header for the hub, made with huggingface_hub's ModelCard from what is known."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.core.method import Method
from lightning_peft.formats.card_sections import (
    changes_section,
    curves_section,
    data_section,
    metrics_section,
    setup_section,
    spoken,
    versions_section,
)
from lightning_peft.formats.hf_peft import has_peft_format
from lightning_peft.formats.hub import hub_name
from lightning_peft.formats.loading_snippets import loading_section
from lightning_peft.formats.markdown import code, one_line, prose
from lightning_peft.formats.model_class import ModelClass
from lightning_peft.formats.training_record import TrainingRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD = "README.md"
CURVES = "curves.png"


@dataclass(frozen=True)
class Card:
    """A model card and its picture.

    Attributes:
        text: what goes into README.md.
        curves: a PNG of the training's curves, which the text shows; None where there are none.
    """

    text: str
    curves: bytes | None

    def write(self, folder: Path, beside: Path) -> None:
        """Writes the card, unless a user's file of one of its names lies where the folder goes.

        Args:
            folder: where to write.
            beside: the folder whose files are kept.
        """
        kept = [n for n in (CARD, CURVES) if (beside / n).exists()]
        if kept:
            warnings.warn(f"{beside / kept[0]} was there before and is kept: no model card is written", stacklevel=2)
            return
        (folder / CARD).write_text(self.text, encoding="utf-8")
        if self.curves is not None:
            (folder / CURVES).write_bytes(self.curves)


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of; what is not known is None or empty, and then left out.

    Attributes:
        folder: the folder's name, as it is to be loaded.
        form: ``"adapter"``, ``"merged"``, or the consumer that the adapter was written for.
        method: the method.
        base: the base, as `base_description` gives it.
        model: the model's class.
        info: what is written beside the adapter, such as ``task`` and ``model``.
        trainable: trained parameters.
        total: parameters of the model.
        places: where they are: module, what trains there, how many modules, how many parameters.
        max_lora_rank: what a server has to be started for, where that is more than it takes by itself.
        prepares: transformers' class that loads what prepares inputs, if that lies beside a merged model.
        training: how it was trained.
    """

    folder: str
    form: str
    method: Method
    base: dict[str, Any]
    model: ModelClass
    info: dict[str, Any]
    trainable: int
    total: int
    places: tuple[tuple[str, str, int, int], ...]
    max_lora_rank: int | None
    prepares: str | None
    training: TrainingRecord | None

    @property
    def base_on_hub(self) -> str | None:
        """The base's name on the hub; None for a local folder, whose path is nobody's business."""
        return hub_name(self.base["name"])

    @property
    def base_called(self) -> str | None:
        """What the base is called: its name on the hub, or that of its folder."""
        name = self.base["name"]
        return self.base_on_hub or (Path(name).name if name else None)

    @property
    def method_called(self) -> str:
        """The method's name; that of the tuner where it is one of ``peft``'s."""
        tuner = vars(self.method).get("config")
        return str(tuner["peft_type"]) if isinstance(tuner, dict) else type(self.method).__name__

    @property
    def title(self) -> str:
        """The card's heading."""
        on = self.base_called or self.model.name
        return f"{on} with {self.method_called} merged" if self.form == "merged" else f"{self.method_called} for {on}"


def made_card(facts: CardFacts, curves: bytes | None) -> Card:
    """Writes a card's text.

    Args:
        facts: what is known.
        curves: the picture, where there is one.
    """
    from huggingface_hub import ModelCard

    training = facts.training
    sections = [
        f"# {prose(facts.title)}",
        _introduction(facts),
        loading_section(facts),
        changes_section(facts.method, facts.places, facts.trainable, facts.total),
        metrics_section(training) if training else "",
        curves_section(CURVES) if curves is not None else "",
        data_section(training.data) if training and training.data else "",
        setup_section(training) if training else "",
        versions_section(training),
    ]
    body = "\n\n".join(s for s in sections if s)
    return Card(str(ModelCard(f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}\n")), curves)


def metadata(facts: CardFacts) -> ModelCardData:
    """The header, as the hub reads it.

    Args:
        facts: what is known.
    """
    from huggingface_hub import ModelCardData

    is_merged = facts.form == "merged"
    own = "peft" if has_peft_format(facts.method) else "lightning_peft"
    base = facts.base_on_hub
    name = facts.method_called.lower()
    tags = ["lightning_peft", name, *(["transformers"] if facts.model.is_transformers else [])]
    if base and not is_merged:
        tags.insert(0, f"base_model:adapter:{base}")
    data = facts.training.data if facts.training and facts.training.data else {}
    results = _results(facts, data)
    made = ModelCardData(
        base_model=base,
        datasets=[data["hub_name"]] if data.get("hub_name") else None,
        library_name="transformers" if is_merged else own,
        pipeline_tag=facts.model.pipeline_tag,
        tags=tags,
        model_name=one_line(facts.title) if results else None,
        eval_results=results or None,
    )
    if base:
        made["base_model_relation"] = "finetune" if is_merged else "adapter"
    return made


def _results(facts: CardFacts, data: dict[str, Any]) -> list[EvalResult]:
    """The metrics for the hub's tables, which want to know of which task and data they are."""
    from huggingface_hub import EvalResult

    task = facts.model.pipeline_tag
    if facts.training is None or task is None or not data.get("origin"):
        return []
    found = []
    for name, value in facts.training.reached.items():
        split, metric = spoken(name)
        if split is not None and metric != "loss":
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=data.get("hub_name") or one_line(data["origin"]),
                    dataset_name=one_line(data["origin"]),
                    dataset_split=split,
                    metric_type=one_line(metric),
                    metric_value=round(value, 6),
                )
            )
    return found


def _introduction(facts: CardFacts) -> str:
    base, called = facts.base_on_hub, facts.base_called
    linked = f"[`{base}`](https://huggingface.co/{base})" if base else code(called or facts.model.name)
    of = f", a {code(facts.model.name)}" if called else ""
    what = (
        f"{linked}{of}, with an adapter merged into its weights"
        if facts.form == "merged"
        else f"An adapter for {linked}{of}"
    )
    revision = f", revision {code(facts.base['revision'])}" if facts.base["revision"] else ""
    mark = f"\n\nBase fingerprint: `{facts.base['fingerprint']}`{revision}." if facts.base["fingerprint"] else ""
    return f"{what}, made with lightning_peft by the method {prose(facts.method_called)}.{mark}{_quantization(facts)}"


def _quantization(facts: CardFacts) -> str:
    given = facts.base["quantization"]
    if given is None:
        return ""
    how = f"{prose(str(given.get('quant_method')))}{', 4 bits' if given.get('load_in_4bit') else ''}"
    if facts.form == "merged":
        return f"\n\nIts weights are quantized ({how}), and were again when the adapter was merged."
    if facts.base["codes"]:
        return f"\n\nIt holds what quantizing the base has lost, so it fits the base in the same codes alone ({how})."
    return f"\n\nThe base was quantized while it was trained ({how}); it fits the base as it was too."
