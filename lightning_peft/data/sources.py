"""Examples from local files, folders that `datasets` saved, and the hub, under the names that a task knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.core.problems import nearest
from lightning_peft.data.files import Example, Files, Row, find_files, read_file
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.tables import from_rows
from lightning_peft.formats.hub import hub_is_reachable

if TYPE_CHECKING:
    from lightning_peft.tasks.columns import Columns

ID = "id"


def from_files(files: Files, *, whole_texts: bool = False) -> Iterator[Example]:
    """The rows of local files, one file after the other; see `find_files` and `read_file`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file as a whole cannot be read.
    """
    found = find_files(files)  # here and not in the generator: a wrong name is an error of the call
    return (example for path in found for example in read_file(path, whole_texts=whole_texts))


def from_dataset(name: str, split: str, *, streaming: bool = False) -> Iterator[Example] | None:
    """The rows of a folder that ``save_to_disk`` wrote, or of a data set of the hub.

    Args:
        name: the folder, or ``"owner/name"``, or ``"owner/name:configuration"``.
        split: ``"train"``, ``"validation"`` or ``"test"``; in the data its name may be another that `datasets` takes
            for the same, such as ``"dev"``.
        streaming: read the hub's files as they come instead of fetching all first.

    Returns:
        The rows, or None if the data set has no such split.

    Raises:
        ConnectionError: if the name cannot be fetched.
        ValueError: if it is a file.
    """
    import datasets
    from datasets.data_files import SPLIT_KEYWORDS

    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded: Any = datasets.load_from_disk(name)
    elif folder.is_file():
        raise ValueError(f"source={name} is a file: give it as train_files")
    else:
        path, _, configuration = name.partition(":")
        try:
            if not Path(path).exists() and not hub_is_reachable():
                raise OSError("the hub is out of reach")
            loaded = datasets.load_dataset(path, configuration or None, streaming=streaming)
        except (OSError, datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            raise ConnectionError(
                f"the data set {name!r} could not be fetched ({type(error).__name__}); without a network pass local "
                "files (data.train_files=...), or data.source=docstrings for the embedded data"
            ) from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    found = next((n for n in SPLIT_KEYWORDS[split] if n in loaded), None)
    return None if found is None else from_rows(loaded[found], f"{name}, {found}")


def named(
    examples: Iterable[Example],
    columns: dict[str, str],
    shapes: Sequence[Columns],
    problems: RowProblems,
    *,
    training: bool,
) -> Iterator[Example]:
    """Rows with a task's columns, under the task's names; a column ``id`` stays.

    Args:
        examples: as they were read.
        columns: the data's name for each of the task's; those not listed have the task's.
        shapes: what columns the task can take; the first shape that a row fills is taken.
        problems: takes note of rows that are broken or lack a column.
        training: whether what is to be learnt must be there too.

    Yields:
        The rows that can be used.
    """
    for number, example in enumerate(examples):
        row = example.row
        if row is None:
            problems.add(example.place, example.problem)
            continue
        lacking = {s: [c for c in s.required(training=training) if row.get(columns.get(c, c)) is None] for s in shapes}
        # of two that lack as much, the one of which more is there
        shape = min(shapes, key=lambda s: (len(lacking[s]), -len(s.required(training=training))))
        if lacking[shape]:
            problems.add(example.place, f" {_lacks(row, lacking[shape][0], columns, shapes, shape)}")
            continue
        kept = {c: row[columns.get(c, c)] for c in shape.all() if row.get(columns.get(c, c)) is not None}
        if (known_as := row.get(columns.get(ID, ID))) is not None:
            kept.setdefault(ID, known_as)
        yield Example(kept, example.place, number=number)


def _lacks(row: Row, column: str, columns: dict[str, str], shapes: Sequence[Columns], shape: Columns) -> str:
    wanted = columns.get(column, column)
    if wanted in row:
        return f"has nothing in the column {wanted!r}: fill it in or leave the row out"
    known = " or ".join("+".join(s.inputs + s.targets) for s in shapes)
    others = f"; the task takes {known}" if len(shapes) > 1 else ""
    free = [name for name in row if name not in {columns.get(c, c) for c in shape.all()}]
    return f"has no column {wanted!r}{nearest(wanted, free)} (name it with data.columns.{column}=...){others}"
