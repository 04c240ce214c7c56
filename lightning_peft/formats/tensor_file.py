"""The file with an adapter's tensors: written, read, and compared with what a model has room for."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load_file
from torch import Tensor

from lightning_peft.core.problems import an

TENSORS = "adapter_model.safetensors"


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes an adapter's tensors.

    Args:
        folder: where.
        tensors: by their names in the file; tied ones are written once for each name.

    Raises:
        ValueError: if the numbers of a tensor do not lie in this process's memory.
    """
    held = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}  # until they are written
    specs = {}
    for key, tensor in held.items():
        place = tensor.data_ptr()
        if not place and tensor.numel():
            kind = an(type(tensor).__name__)
            raise ValueError(f"{key!r} is {kind}, which holds no numbers of its own; make a plain tensor of it first")
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs[key] = TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=place, data_len=tensor.nbytes)
    # what safetensors.torch.save_file does, in a fifth of its time; and it refuses tensors that share memory
    serialize_file(specs, folder / TENSORS, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads an adapter's tensors into memory.

    Args:
        folder: where.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read.
    """
    try:
        # each mapped tensor would take four times as long
        return load_file(folder / TENSORS, backend="pread")
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} cannot be read, it may be cut short: {error}") from error


def check_tensors(folder: Path, stored: dict[str, Tensor], wanted: dict[str, Tensor], *, if_missing: str = "") -> None:
    """Compares what a file holds with what is to be filled.

    Args:
        folder: where the file is, for errors.
        stored: the file's tensors.
        wanted: those of the model under the names in the file.
        if_missing: what may be said where one is missing.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape or not finite.
    """
    problems = list[str]()
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing:
        problems.append(f"{len(missing)} missing, such as {missing[0]}{if_missing}")
    if extra:
        problems.append(f"{len(extra)} unexpected, such as {extra[0]}")
    both = sorted(wanted.keys() & stored.keys())
    problems += [
        f"{key} is {tuple(stored[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in both
        if wanted[key].shape != stored[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"the tensors in {folder / TENSORS} do not fit this model: {shown}")
    broken = [k for k in both if not _is_finite(stored[k])]
    if broken:
        more = f" and in {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(
            f"{folder / TENSORS} has NaN or infinite values in {broken[0]}{more}: the training that wrote it diverged, "
            "or the file is damaged"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. A sum that is finite has such terms only, and is had for a third of looking at each."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.itemsize > 1 else tensor.float()  # 8 bits are not added up
    return math.isfinite(wide.sum().item()) or bool(torch.isfinite(wide).all())
