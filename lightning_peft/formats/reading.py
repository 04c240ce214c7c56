"""Reading files that may be cut short, damaged or of another kind: the error names the file and what is wrong."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lightning_peft.core.options import misfits
from lightning_peft.core.problems import an, shortened
from lightning_peft.formats.instructions import refuse_instructions
from lightning_peft.formats.vouched import refuse_unvouched

_NOTHING: Mapping[str, Any] = MappingProxyType({})
FORMAT = 1
"""The form of what is written: of an adapter's manifest and tensors, and of a checkpoint's record of its adapters."""

_MOST_DIGITS = 40
_LONGEST_JSON = 64 * 2**20  # bytes, some hundred times what the largest models' manifests take


def refuse_links(folder: Path) -> None:
    """Refuses a folder in which, or below which, a file is somewhere else, as a link may say that came with it.

    The hub's cache is known: its folders are links into the ``blobs`` beside them.

    Args:
        folder: an adapter's folder.

    Raises:
        ValueError: if a link leads out of it.
    """
    home = folder.resolve()
    caches = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    for below, folders, files in os.walk(folder):
        for entry in (os.path.join(below, name) for name in (*folders, *files)):
            if not os.path.islink(entry):
                continue
            leads = Path(os.path.realpath(entry))
            if not any(leads.is_relative_to(place) for place in (home, *caches)):
                raise ValueError(
                    f"{entry} is a link that leads out of the folder, to {leads}; put the file itself there if it "
                    "belongs to the adapter"
                )


def read_json(path: Path, needed: Mapping[str, Any] = _NOTHING) -> dict[str, Any]:
    """A file's JSON object.

    Args:
        path: the file.
        needed: the keys that it must have, and what stands there, as the type hints of options say it.

    Raises:
        ValueError: if it is too long, no JSON, no object, or lacks a key.
    """
    size = path.stat().st_size
    if size > _LONGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, and {_LONGEST_JSON:,} are read at most: it is no adapter's file")
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} nests its values too deeply: it is no adapter's file") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, it may be cut short: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {an(type(found).__name__)}")
    if "format" in needed:
        refuse_later(path, found)
    wrong = misfits(found, needed)
    if wrong:
        raise ValueError(f"{path} has no {', '.join(wrong)}, or something else there; save the adapter again")
    return found


def parsed(text: str | bytes) -> Any:
    """What a text of JSON says, if it says nothing twice and its numbers are of a length that one can compute with.

    Args:
        text: the text.

    Raises:
        ValueError: if it is no JSON, a key comes again in an object, or a number has more digits than any.
        RecursionError: if it nests its values too deeply.
    """
    return json.loads(text, object_pairs_hook=_distinct, parse_int=_whole)


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:  # the time that they take grows with the square of their number
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object: of two entries under one key some readers take the first, and others the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it says {shortened(repr(twice), 200)} twice")
    return found


def refuse_later(path: Path | str, found: Mapping[str, Any]) -> None:
    """Refuses what a later version has written in a form that this one does not know.

    Args:
        path: where it is from.
        found: what was read; its ``format``, if it has one, is a number that grows.

    Raises:
        ValueError: if it is newer, or the number is none.
    """
    form = found.get("format", FORMAT)
    if not isinstance(form, int) or isinstance(form, bool) or form < 1:
        raise ValueError(f"{path}: its format must be a whole number of 1 or more, but is {shortened(repr(form), 200)}")
    if form > FORMAT:
        raise ValueError(
            f"{path} is of format {form}, and this version of lightning_peft reads formats up to {FORMAT}; install "
            "the version that wrote it, or a later one: pip install -U lightning-peft"
        )


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """A ``with`` block in which an error about a file's content names the file.

    Args:
        path: the file.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, re.error) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        what = str(error) if isinstance(error, ValueError) else f"what it says cannot be: {error!r}"
        short = shortened(what)
        # a traceback would print the long one too
        raise ValueError(f"{path}: {short}") from (error if short == what else None)
    except RecursionError:
        raise ValueError(f"{path} nests its values too deeply: it is no adapter's file") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint on the CPU; its tensors are read from the disk when they are used.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or holds more than dense tensors and plain values (caused by an
            ``UnpicklingError`` then), or asks for more memory than its bytes account for.
    """
    if not path.is_file():
        what = "is a folder, but a checkpoint is a file" if path.is_dir() else "is no file"
        raise FileNotFoundError(f"{path} {what}; pass the path of a .ckpt")
    # torch's own errors about a file without the index at its end name neither the file nor the cause
    if not _is_archive(path):
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is no checkpoint, or one that is cut short; copy or save it again")
    _refuse_changed(path)
    try:
        refuse_instructions(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged stream of instructions does to the reader of it
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be damaged: {error}") from error
    with naming(path):
        refuse_unvouched(path, found)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no state_dict")
    if not isinstance(found.get("hyper_parameters", {}), dict):
        raise ValueError(f"{path} is no checkpoint of Lightning: its hyper_parameters are no dictionary")
    # by which Lightning would rewrite what its first versions wrote
    version = found.get("pytorch-lightning_version", "2")
    if not isinstance(version, str) or not re.match(r"[2-9]\d*(\.\d+)*([a-z0-9.+]*)$", version):
        raise ValueError(f"{path} must be of Lightning 2 or later, but names the version {version!r}")
    return found


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a damaged end may say that there are more disks
        return False


def _refuse_changed(path: Path) -> None:
    """Refuses a checkpoint with packed parts, of which nobody knows how much memory they take: torch packs none.

    So it does one whose list of instructions is not what was written: what that would call says nothing.
    """
    try:
        with zipfile.ZipFile(path) as file:
            packed = [part.filename for part in file.infolist() if part.compress_type != zipfile.ZIP_STORED]
            for part in () if packed else file.namelist():
                if part.rpartition("/")[2] == "data.pkl":
                    file.read(part)  # which compares its checksum
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be damaged: {error}") from error
    if packed:
        raise ValueError(f"{path}: {packed[0]} in it is compressed, which torch.save never does; it is no checkpoint")
