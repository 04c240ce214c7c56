"""A whole model with the adapter folded in, which plain transformers loads."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from torch.nn import Module

from lightning_peft.core.merge import fold, ties
from lightning_peft.formats.places import refuse_file


def unload_merged(model: Module, name: str) -> None:
    """Merges an adapter for good and takes it out; a config that says ends are tied says so only where they are.

    Args:
        model: an adapted model.
        name: the adapter's name.

    Raises:
        ValueError: if the method cannot be merged.
    """
    before = ties(model)
    fold(model, name)
    config = getattr(model, "config", None)
    # What is merged into one end of a tie is not in the other: tied again at loading, it would be
    if before != ties(model) and getattr(config, "tie_word_embeddings", False):
        cast(Any, config).tie_word_embeddings = False


def save_merged(model: Module, name: str, path: Path, tokenizer: Any = None) -> Path:
    """Writes the merged model; the one in memory stays adapted as it is.

    Args:
        model: an adapted Hugging Face model.
        name: the adapter's name.
        path: a folder that does not exist yet, or is empty.
        tokenizer: a tokenizer to write beside it.

    Returns:
        The folder.

    Raises:
        TypeError: if the model has no ``save_pretrained``.
        ValueError: if the method cannot be merged.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        cast(Any, twin).save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        if path.exists():
            path.rmdir()
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path
