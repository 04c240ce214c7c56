"""A whole model with the adapter folded in, which plain transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from torch.nn import Module

from lightning_peft.core.adapters import Adapters, refuse_in_use, require_adapters
from lightning_peft.core.inject import eject
from lightning_peft.core.merge import fold, ties
from lightning_peft.formats.card import Card
from lightning_peft.formats.places import refuse_file
from lightning_peft.formats.writing import written_whole


def unload_merged(model: Module, name: str) -> None:
    """Merges an adapter for good and takes all out; a config that says ends are tied says so only where they are.

    Adapters that were merged without originals stay in the weights; those that do nothing go without a trace.

    Args:
        model: an adapted model.
        name: the adapter's name.

    Raises:
        ValueError: if the method cannot be merged, or another adapter acts and could be taken back; nothing is changed
            then.
        RuntimeError: if an adapter is in use in an ``adapter_names`` block.
    """
    adapters = require_adapters(model, [name])
    others = [n for n in adapters if n != name]
    for used in adapters:
        refuse_in_use(adapters, used)
    for other in others:
        _refuse_acting(adapters, other, name)
    before = ties(model)
    fold(model, name)
    for other in others:
        if other in adapters.merged:
            fold(model, other)
        else:
            eject(model, other)
    config = getattr(model, "config", None)
    # What is merged into one end of a tie is not in the other: tied again at loading, it would be
    if before != ties(model) and getattr(config, "tie_word_embeddings", False):
        cast(Any, config).tie_word_embeddings = False


def _refuse_acting(adapters: Adapters, other: str, name: str) -> None:
    in_place = adapters.trees[other].record.in_place
    if other in adapters.merged:
        if not adapters.merged[other]:
            return
        how, without = "is merged and its originals wait", "unmerge() and remove() it"
    elif other in adapters.switch.active:
        how, without = "is active too", f"leave it out by activate(model, {name!r})"
    elif in_place:
        how, without = f"trains {in_place[0]!r} in place, so it acts though it is not active", "remove() it"
    else:
        return
    raise ValueError(
        f"a plain model with the adapter {name!r} merged: the adapter {other!r} {how}; {without}, or keep what it does "
        "by merging it for good first: merge(keep_originals=False)"
    )


def save_merged(model: Module, name: str, path: Path, processing_class: Any = None, card: Card | None = None) -> Path:
    """Writes the merged model, without the adapters that do nothing; the one in memory stays adapted as it is.

    Args:
        model: an adapted Hugging Face model.
        name: the adapter's name.
        path: a folder that does not exist yet, or is empty.
        processing_class: a tokenizer or an image processor to write beside it.
        card: its model card.

    Returns:
        The folder.

    Raises:
        TypeError: if the model has no ``save_pretrained``.
        ValueError: if the method cannot be merged, or another adapter acts and could be taken back.
        RuntimeError: if an adapter is in use in an ``adapter_names`` block.
        FileExistsError: if the folder holds something, or a file is in its place.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained; save its state_dict() after merge_and_unload()"
        )
    refuse_file(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} already holds files; choose another folder or move it away")
    twin = copy.deepcopy(model)
    unload_merged(twin, name)
    with written_whole(path, last=("config.json",)) as scratch:
        cast(Any, twin).save_pretrained(scratch)
        if processing_class is not None:
            processing_class.save_pretrained(scratch)
        if card is not None:
            card.write(scratch, beside=path)
    return path
