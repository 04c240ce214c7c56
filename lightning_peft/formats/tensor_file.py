"""The file with an adapter's tensors: written, read, and compared with what a model has room for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_peft.core.problems import an, shortened
from lightning_peft.formats.reading import FORMAT, parsed, refuse_later

TENSORS = "adapter_model.safetensors"

_ABOUT = {"format": "pt", "lightning_peft_format": str(FORMAT)}
_LONGEST_HEADER = 64 * 2**20
_MOST_DIMENSIONS = 64  # which torch can compute with; the product of a million takes an age
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    serialize_file(specs, folder / TENSORS, metadata=_ABOUT)
    with (folder / TENSORS).open("r+b") as file:
        # two entries come in any order, but the same adapter is to be the same bytes
        file.seek(8)
        file.write(json.dumps({"__metadata__": _ABOUT}, separators=(",", ":"))[:-1].encode())


def read_entries(folder: Path) -> dict[str, Entry]:
    """What an adapter's file says of its tensors; none of them is read.

    Args:
        folder: where.

    Returns:
        Shape and dtype by name. All of them together are no larger than the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or of a later version.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, and an adapter's tensors lie there; copy the whole folder")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path} cannot be read, it may be cut short: it has {size:,} bytes, and a header of {length:,} is "
                "to follow its first 8"
            )
        header = file.read(length)
    try:
        found = parsed(header)
        about = found.pop("__metadata__", {})
        entries = {name: _entry(name, said, size - 8 - length) for name, said in found.items()}
        if sum(end - begin for begin, end in (said["data_offsets"] for said in found.values())) != size - 8 - length:
            raise ValueError("its tensors overlap, or leave gaps or bytes behind them")
        form = {"format": int(about.get("lightning_peft_format", FORMAT))}
    except RecursionError:
        raise ValueError(f"{path} nests its values too deeply: it is no file of tensors") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read, it may be cut short: {error}") from error
    refuse_later(path, form)
    return entries


def _entry(name: str, said: dict[str, Any], room: int) -> Entry:
    dtype, shape, (begin, end) = _DTYPES.get(said["dtype"]), said["shape"], said["data_offsets"]
    called = shortened(repr(name), 200)
    if dtype is None:
        kind = shortened(repr(said["dtype"]), 200)
        raise ValueError(f"{called} is of the dtype {kind}, expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{called} has a shape that no tensor has: {shortened(repr(shape), 200)}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        where = f"the shape {shape!r} and lies from {begin!r} to {end!r}"
        raise ValueError(f"{called} has {shortened(where, 200)}")
    if math.prod(shape) * dtype.itemsize != end - begin or end > room:
        raise ValueError(f"{called}, {dtype} of {tuple(shape)}, does not lie within the {room:,} bytes from {begin:,}")
    return Entry(tuple(shape), dtype)


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
        said = shortened(str(error))
        raise ValueError(f"{folder / TENSORS} cannot be read, it may be cut short: {said}") from error


def check_entries(
    folder: Path, stored: Mapping[str, Entry | Tensor], wanted: Mapping[str, Tensor], *, if_missing: str = ""
) -> None:
    """Compares what a file says of its tensors with what is to be filled.

    Args:
        folder: where the file is, for errors.
        stored: the file's tensors, or what it says of them.
        wanted: those of the model under the names in the file.
        if_missing: what may be said where one is missing.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape, or of another kind of numbers.
    """
    problems = list[str]()
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing:
        problems.append(f"{len(missing)} missing, such as {missing[0]}{if_missing}")
    if extra:
        problems.append(f"{len(extra)} unexpected, such as {shortened(extra[0], 200)}")
    for key in sorted(wanted.keys() & stored.keys()):
        mine, there = wanted[key], stored[key]
        if tuple(mine.shape) != tuple(there.shape):
            problems.append(f"{key} is {tuple(there.shape)}, expected {tuple(mine.shape)}")
        elif _kind(mine.dtype) != _kind(there.dtype):
            problems.append(f"{key} is {there.dtype}, expected {mine.dtype}")
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"the tensors in {folder / TENSORS} do not fit this model: {shown}")


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype is torch.bool


def fitted(folder: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in the dtypes in which they are wanted.

    Args:
        folder: where the file is, for errors.
        stored: the file's tensors, which `check_entries` has seen.
        wanted: those of the model under the names in the file.

    Raises:
        ValueError: if a number is not finite, there or in its new dtype.
    """
    found = {k: t if t.dtype == wanted[k].dtype else t.to(wanted[k].dtype) for k, t in stored.items()}
    broken = sorted(k for k, t in found.items() if not torch.isfinite(t).all()) if _may_break(found.values()) else []
    if broken:
        more = f" and in {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(
            f"{folder / TENSORS} has NaN or infinite values in {broken[0]}{more}: the training that wrote it diverged, "
            "or the file is damaged"
        )
    return found


def _may_break(tensors: Iterable[Tensor]) -> bool:
    """Whether a number may not be finite: a sum that is has such terms only, and takes a tenth of looking at each."""
    floating = [t if t.itemsize > 1 else t.float() for t in tensors if t.is_floating_point()]  # 8 bits have no sums
    return not math.isfinite(get_total_norm(floating, 1.0).item())
