"""A whole model with the adapter folded in, which plain transformers loads."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from torch.nn import Module

from lightning_peft.core.adapters import tree_of
from lightning_peft.core.inject import eject
from lightning_peft.core.merge import merge


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
        FileExistsError: if the folder holds something.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained; save its state_dict() after merge_and_unload()"
        )
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} already holds files; choose another folder or move it away")
    twin = copy.deepcopy(model)
    merge(twin, name)
    tree = tree_of(twin, name)
    # where the other end of a tie still holds the original, the two are tied no more
    originals = {id(original) for original, _ in (tree.record.merged or {}).values()}
    untied = any(id(parameter) in originals for parameter in twin.parameters())
    tree.record.merged, tree.record.originals = None, {}
    eject(twin, name)
    config = cast(Any, twin).config
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
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
