"""An adapter's model card out of what its model, its plan and its training say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch.nn import Module

from lightning_peft.analysis.curves import curves_png
from lightning_peft.analysis.plan import plan_of
from lightning_peft.core.adapters import tree_of
from lightning_peft.formats.base_identity import base_description
from lightning_peft.formats.card import Card, CardFacts, made_card
from lightning_peft.formats.model_class import ModelClass, loader_of
from lightning_peft.formats.serving import DEFAULT_MAX_LORA_RANK, rank_in_file, served_rank


def card_of(
    model: Module,
    name: str,
    path: str | Path,
    form: str = "adapter",
    *,
    info: dict[str, Any] | None = None,
    processing_class: Any = None,
    base: dict[str, Any] | None = None,
) -> Card | None:
    """The card for an export; what is not known of the adapter is left out of it.

    What cannot be written down, such as notes of a training that a file has from elsewhere, costs the card and not the
    adapter: then there is a warning, and no card.

    Args:
        model: the adapted model.
        name: the adapter's name.
        path: the folder of the export; the card names it without where it lies.
        form: ``"adapter"``, ``"merged"``, or the consumer that the adapter is written for.
        info: what is written beside the adapter.
        processing_class: what is written beside a merged model: a tokenizer or an image processor.
        base: as `base_description` gives it, where that is known already.
    """
    plan, record = plan_of(model, name), tree_of(model, name).record
    rank = rank_in_file(model, name) if form == "vllm" else 0
    facts = CardFacts(
        folder=Path(path).resolve().name,
        form=form,
        method=record.method,
        base=base or base_description(model, [name]),
        model=ModelClass.of(model),
        info=info or {},
        trainable=plan.trainable,
        total=plan.total,
        places=tuple((row.place, row.what, row.modules, row.parameters) for row in plan.rows),
        max_lora_rank=served_rank(rank) if rank > DEFAULT_MAX_LORA_RANK else None,
        prepares=loader_of(processing_class),
        training=record.training,
    )
    try:
        card = made_card(facts, None if record.training is None else curves_png(record.training))
        card.text.encode()
    except Exception as error:  # whatever it is, the weights are worth more
        warnings.warn(f"{path}: no model card is written, since it could not be made: {error!r}", stacklevel=3)
        return None
    return card
