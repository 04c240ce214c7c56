"""Local files as rows, each with its place: JSON, CSV, TSV, Parquet, Arrow and plain text, packed or not."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.core.problems import an, nearest

Row = dict[str, Any]
Files = str | Path | Sequence[str | Path]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_PACKED = {".gz": "gzip", ".zst": "zstd"}
# What `datasets` writes beside its Arrow files
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True, slots=True)
class Example:
    """A row and where it stands.

    Attributes:
        row: column to value; None where the place holds no row.
        place: file and line, for errors.
        problem: why there is no row.
        number: how many rows were read before it, once it has the task's names.
    """

    row: Row | None
    place: str
    problem: str = ""
    number: int = 0


def find_files(given: Files) -> list[Path]:
    """The files that names, folders and patterns stand for.

    Args:
        given: one or several of: a file; a folder, of which all files that can be read and are not hidden are taken, in
            the order of their names; a pattern such as ``"parts/*.jsonl.gz"``, ``**`` for any folders.

    Returns:
        The files, each once.

    Raises:
        FileNotFoundError: if a name or a pattern stands for nothing; near names are listed.
        ValueError: if a file's ending is none that can be read.
    """
    found: list[Path] = []
    for name in [given] if isinstance(given, str | Path) else given:
        path = Path(name)
        if path.is_file():
            if format_of(path) is None:
                raise ValueError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(FORMATS)}, or with .gz")
            found.append(path)
            continue
        inside = _visible(path) if path.is_dir() else map(Path, glob.glob(str(name), recursive=True))
        some = sorted(p for p in inside if p.is_file() and format_of(p) and p.name not in _SAVED)
        if not some:
            what = "holds no file that" if path.is_dir() else "stands for no file that"
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            if not path.is_dir() and not glob.has_magic(str(name)):
                raise FileNotFoundError(f"there is no file {str(path)!r}{nearest(path.name, there)}")
            raise FileNotFoundError(f"{str(name)!r} {what} can be read; files end in {', '.join(FORMATS)}, or with .gz")
        found += some
    return list(dict.fromkeys(found))


def _visible(folder: Path) -> Iterator[Path]:
    """Without hidden files and folders, as patterns leave them out: editors and notebooks keep copies in those."""
    return (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def format_of(path: Path) -> str | None:
    """A file's format by its ending, without that of its packing; None where it is none that can be read."""
    name = path.name.lower()
    for packing in _PACKED:
        name = name.removesuffix(packing)
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def read_file(path: Path, *, whole_texts: bool = False) -> Iterator[Example]:
    """The rows of a file, broken ones as examples without a row.

    Args:
        path: the file.
        whole_texts: take a ``.txt`` file as one row; otherwise each of its lines is one.

    Yields:
        The rows in order. A JSON object a line, or one list of objects, or one object; a table's rows by its header; of
        a plain text the column is ``text``.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    kind = format_of(path)
    if kind in (".parquet", ".arrow"):
        yield from _read_table(path, kind)
        return
    try:
        with _opened(path) as file:
            if kind in (".csv", ".tsv"):
                yield from _read_csv(path, file, "," if kind == ".csv" else "\t")
            elif kind == ".txt":
                yield from _read_text(path, file, whole_texts)
            else:
                yield from _read_json(path, file, lines=kind == ".jsonl")
    except OSError as error:
        if path.suffix.lower() not in _PACKED:
            raise
        raise ValueError(f"{path} cannot be unpacked, it is damaged or cut short: {error}") from error


def _opened(path: Path) -> io.TextIOWrapper:
    import pyarrow as pa

    # Arrow's streams say that a file was cut short, which zstandard's do not
    packing = _PACKED.get(path.suffix.lower())
    file: Any = path.open("rb") if packing is None else pa.input_stream(path, compression=packing)
    # bytes that are no UTF-8 become lone surrogates, so that the line they stand in can be named
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _wrong_encoding(text: str) -> str:
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return " is not in UTF-8: convert the file, for example with iconv"
    return ""


def _read_json(path: Path, file: Iterable[str], *, lines: bool) -> Iterator[Example]:
    if not lines:
        text = "".join(file)
        values = _list_in(path, text)
        if values is not None:
            yield from _in_list(path, text, values)
            return
        file = io.StringIO(text)  # at line feeds alone: a string may hold what else Unicode calls a line's end
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        problem, value = _wrong_encoding(line), None
        if not problem:
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f" is no JSON: {error.msg} at column {error.colno}"
            else:
                problem = _half_a_character(value) if "\\u" in line else ""
        yield _object(value, place, problem)


def _list_in(path: Path, text: str) -> list[Any] | None:
    """The rows of a list, or of one object, over several lines perhaps; None where each line is for itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}, line {error.lineno} is no JSON: {error.msg} at column {error.colno}") from error
        return None
    return value if isinstance(value, list) else [value]


def _half_a_character(value: Any) -> str:
    r"""A pair such as ``\ud83d\ude00`` that was cut in two is fine for JSON, but no text that can be encoded."""
    if _wrong_encoding(json.dumps(value, ensure_ascii=False)):
        return r" has half a character, such as \ud83d without its other half: mend it or leave the row out"
    return ""


def _in_list(path: Path, text: str, values: list[Any]) -> Iterator[Example]:
    raw = _wrong_encoding(text)
    for number, value in enumerate(values, start=1):
        half = _half_a_character(value)
        yield _object(value, f"{path}, row {number}", half and (raw or half))


def _object(value: Any, place: str, problem: str) -> Example:
    if not problem and not isinstance(value, dict):
        problem = f" is {an(type(value).__name__)}; expected an object with columns"
    return Example(None, place, problem) if problem else Example(value, place)


def _read_csv(path: Path, file: Iterable[str], delimiter: str) -> Iterator[Example]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 128 kB
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Example(None, f"{path}, line {reader.line_num}", f" is no row of a table: {error}")
            continue
        place = f"{path}, line {reader.line_num}"
        if header is None:
            header = fields
        elif problem := _wrong_encoding(delimiter.join(fields)):
            yield Example(None, place, problem)
        elif fields and len(fields) != len(header):
            yield Example(None, place, f" has {len(fields)} fields, but the header has {len(header)}")
        elif fields:
            yield Example(dict(zip(header, fields, strict=True)), place)


def _read_text(path: Path, file: Iterable[str], whole: bool) -> Iterator[Example]:
    texts = ["".join(file)] if whole else file
    for number, text in enumerate(texts, start=1):
        if text.strip():
            place = str(path) if whole else f"{path}, line {number}"
            problem = _wrong_encoding(text)
            row = {"text": text if whole else text.rstrip("\r\n")}
            yield Example(None, place, problem) if problem else Example(row, place)


def _read_table(path: Path, kind: str) -> Iterator[Example]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == ".parquet":
            batches = pq.ParquetFile(path).iter_batches()
        else:
            source = pa.memory_map(str(path))
            try:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # the other of Arrow's two forms, in which `datasets` writes
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield Example(row, f"{path}, row {number}")
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no {kind.removeprefix('.')} file: {error}") from error
