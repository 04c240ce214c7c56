"""Reading examples: local JSON Lines, CSV and Parquet files, and data sets of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.core.problems import nearest
from lightning_peft.formats.hub import hub_is_reachable

Row = dict[str, Any]
_READERS = (".jsonl", ".json", ".csv", ".parquet")


def read_files(files: str | Path | Sequence[str | Path], columns: dict[str, str], required: Sequence[str]) -> list[Row]:
    """Rows of one or several local files, one after the other.

    Args:
        files: paths ending in .jsonl, .json (one object a line, or one list), .csv or .parquet.
        columns: the file's name for each of our columns; those not listed have our name.
        required: our names of the columns that must be there.

    Returns:
        Rows with the required columns, under our names.

    Raises:
        FileNotFoundError: if a file does not exist; near names are listed.
        ValueError: if a line is broken (with its number), a column is missing, or there is no row.
    """
    rows: list[Row] = []
    for name in [files] if isinstance(files, str | Path) else files:
        path = Path(name)
        if not path.is_file():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise FileNotFoundError(f"there is no file {str(path)!r}{nearest(path.name, there)}")
        rows += _renamed(_read(path), columns, required, str(path))
    return rows


def read_hub(name: str, split: str, columns: dict[str, str], required: Sequence[str]) -> list[Row] | None:
    """Rows of a data set on the hub, or in a folder that ``datasets`` understands.

    Args:
        name: ``"owner/name"``, or ``"owner/name:configuration"``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        columns: the data set's name for each of our columns.
        required: our names of the columns that must be there.

    Returns:
        The rows, or None if the data set has no such split.

    Raises:
        ConnectionError: if the name cannot be fetched.
        ValueError: if a column is missing.
    """
    import datasets

    path, _, configuration = name.partition(":")
    try:
        if not Path(path).exists() and not hub_is_reachable():
            raise OSError("the hub is out of reach")
        loaded = datasets.load_dataset(path, configuration or None)
    except (OSError, datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise ConnectionError(
            f"the data set {name!r} could not be fetched ({type(error).__name__}); without a network pass local "
            "files (data.train_files=...), or data.source=docstrings for the embedded data"
        ) from error
    if split not in loaded:
        return None
    return _renamed(loaded[split].to_list(), columns, required, f"{name}, split {split}")


def _read(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix in (".jsonl", ".json"):
        return _read_json(path)
    raise ValueError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_READERS)}")


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                given = len([k for k, v in row.items() if k is not None and v is not None]) + len(row.get(None) or [])
                raise ValueError(
                    f"{path}, line {reader.line_num}: {given} fields, but the header has {len(reader.fieldnames or [])}"
                )
            rows.append(dict(row))
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows: list[Any] = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error.msg} at column {error.colno}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}; expected an object with columns")
    return rows


def _renamed(rows: list[Row], columns: dict[str, str], required: Sequence[str], where: str) -> list[Row]:
    if not rows:
        raise ValueError(f"{where} holds no example")
    renamed: list[Row] = []
    for number, row in enumerate(rows, start=1):
        for name in required:
            wanted = columns.get(name, name)
            if wanted not in row:
                raise ValueError(
                    f"{where}, row {number} has no column {wanted!r}{nearest(wanted, row)} "
                    f"(name it with data.columns.{name}=...)"
                )
            if row[wanted] is None:
                raise ValueError(
                    f"{where}, row {number} has nothing in the column {wanted!r}: fill it in or leave the row out"
                )
        renamed.append({name: row[columns.get(name, name)] for name in required})
    return renamed
