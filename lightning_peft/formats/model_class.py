"""A model's class, as it is named where the model is loaded: transformers' auto class, and the hub's task for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from lightning_peft.core.matching import class_of

_KINDS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "Model": ("AutoModel", "feature-extraction"),
}
_NAMED = 20  # labels that are named where the model is loaded; of more, their number is said


@dataclass(frozen=True)
class ModelClass:
    """What a model is.

    Attributes:
        name: the class's name.
        loader: the class of transformers that loads it; None for a model of another origin.
        pipeline_tag: the hub's name of the task that it is for, where that is known.
        options: what ``from_pretrained`` has to be told so that a bare base gets the model's shape.
    """

    name: str
    loader: str | None = None
    pipeline_tag: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_transformers(self) -> bool:
        """Whether transformers loads it."""
        return self.loader is not None

    @classmethod
    def of(cls, model: Module) -> ModelClass:
        """The class of a model, adapted or not.

        Args:
            model: the model.
        """
        kind = class_of(model)
        config: Any = getattr(model, "config", None)
        # a model of transformers has been imported from it; no other need wait for that import
        transformers: Any = sys.modules.get("transformers")
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return cls(kind.__name__)
        found = next((pair for ending, pair in _KINDS.items() if kind.__name__.endswith(ending)), None)
        if found is not None and getattr(transformers, found[0])._model_mapping.get(type(config), None) is not None:
            return cls(kind.__name__, *found, options=_options(kind.__name__, config))
        own = kind.__name__ if getattr(transformers, kind.__name__, None) is kind else None
        return cls(kind.__name__, own)


def _options(name: str, config: Any) -> dict[str, Any]:
    if name.endswith("Classification"):
        plain = {i: f"LABEL_{i}" for i in range(config.num_labels)}  # what transformers calls them by itself
        if config.id2label != plain and config.num_labels <= _NAMED:
            head: dict[str, Any] = {"id2label": dict(config.id2label)}
        else:
            head = {"num_labels": config.num_labels} if config.num_labels != 2 else {}
        return {**head, "ignore_mismatched_sizes": True}  # the base may have a head for other classes
    # an encoder such as BERT that is made to write
    if name.endswith(("ForCausalLM", "LMHeadModel")) and getattr(config, "is_decoder", False):
        return {"is_decoder": True}
    return {}


def loader_of(processing_class: Any) -> str | None:
    """The class of transformers that loads what prepares a model's inputs.

    Args:
        processing_class: a tokenizer, an image processor, or None.
    """
    if processing_class is None:
        return None
    is_for_images = any("ImageProcess" in kind.__name__ for kind in type(processing_class).__mro__)
    return "AutoImageProcessor" if is_for_images else "AutoTokenizer"
