"""What a base made of held-out rows, on disk: for a run that goes on when the base itself is gone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.analysis.held_out import Reading
from lightning_peft.formats.writing import written_file

KEPT = "forgetting_base.safetensors"


def inputs_digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """Tells rows from any others, as a model is called with them.

    Args:
        batches: the rows.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_kept(folder: Path, reading: Reading, inputs: str) -> None:
    """Keeps what the base made of rows, in place of what another run kept there.

    Args:
        folder: the run's.
        reading: what to keep.
        inputs: the rows' digest.
    """
    loss = [] if reading.loss is None else [reading.loss]
    held = {**reading.states, "": torch.tensor(loss, dtype=torch.float64)}  # no layer has the root's name
    with written_file(folder / KEPT) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, scratch, {"inputs": inputs})


def read_kept(folder: Path | None, inputs: str, layers: Sequence[str]) -> Reading:
    """What the base made of rows where the run began.

    Args:
        folder: the run's.
        inputs: the rows' digest.
        layers: the names of the model's layers.

    Raises:
        ValueError: if nothing was kept, or it is of other rows or another model, or damaged.
    """
    path = None if folder is None else folder / KEPT
    instead = "take method.keep_originals=true from the start, or leave the callback out"
    if path is None or not path.is_file():
        where = "no folder is given" if path is None else f"{path} is not there"
        raise ValueError(
            f"Forgetting: this run goes on from weights that were trained in place without originals, and {where}, "
            f"where its first start keeps what the base said; {instead}"
        )
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("inputs")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it may be damaged ({error}); {instead}") from error
    loss = tensors.pop("", torch.zeros(0))
    fits = all(t.dim() == 2 and t.dtype == torch.float32 for t in tensors.values()) and loss.numel() < 2
    if said != inputs or tensors.keys() != set(layers) or not fits:
        raise ValueError(f"{path} was made of other rows, or by another model, than this run has; {instead}")
    return Reading(float(loss) if loss.numel() else None, {name: tensors[name] for name in layers})
