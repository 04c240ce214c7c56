"""Rows with images from folders of them, and from files that hold them or say where they lie."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_peft.data.files import Example, Files, Row, find_files, format_of, read_file
from lightning_peft.data.images import ImageFile, StoredImage, image_endings
from lightning_peft.data.sources import from_dataset
from lightning_peft.data.tables import from_rows

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def from_image_source(source: str, split: str) -> Iterator[Example] | None:
    """The rows of an image folder, a folder that `datasets` saved, or a data set of the hub.

    Args:
        source: the folder or the name. In an image folder images lie in a subfolder for each class, perhaps below
            ``train``, ``validation`` and ``test``, or a ``metadata.csv`` or ``metadata.jsonl`` describes them.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        The rows, or None if there is no such split.

    Raises:
        FileNotFoundError: if a folder holds no image.
        ValueError: if it cannot be read as an image folder.
    """
    folder = Path(source)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not folder.is_dir() or saved:
        return from_dataset(source, split)
    if not _holds_images(folder):
        raise FileNotFoundError(f"the folder {source!r} holds no image; {_expected(folder)}")
    loaded = _image_folder(source, data_dir=source)
    return _by_path(from_rows(loaded[split], f"{source}, {split}")) if split in loaded else None


def from_image_files(given: Files, column: str) -> Iterator[Example]:
    """The rows of image files, image folders, and files whose column holds images or their paths.

    Args:
        given: one or several of: an image; a folder of them; a file as `read_file` takes it, or a folder of such; a
            pattern for any of these files.
        column: the column with the images: paths, relative to the file's folder, or in a table the images' bytes.

    Raises:
        FileNotFoundError: if a name stands for nothing.
        ValueError: if a file cannot be read.
    """
    names = [given] if isinstance(given, str | Path) else given
    return chain.from_iterable([_of_name(name, column) for name in names])  # a wrong name is an error of the call


def _of_name(name: str | Path, column: str) -> Iterator[Example]:
    path = Path(name)
    if path.is_dir() and _holds_images(path):
        return _by_path(from_rows(_image_folder(path, data_files={"train": [f"{path}/**"]})["train"], str(path)))
    found = sorted(map(Path, glob.glob(str(name), recursive=True)))
    images = [p for p in ([path] if path.is_file() else found) if _is_image(p)]
    if images:
        return (Example({column: ImageFile(image)}, str(image)) for image in images)
    return chain.from_iterable(_of_file(file, column) for file in find_files(name))


def _of_file(path: Path, column: str) -> Iterator[Example]:
    kind = format_of(path) or ""
    if kind in _TABLES:
        loaded = _loaded(path, _TABLES[kind], data_files={"train": [str(path)]})
        examples = from_rows(loaded["train"], str(path))
    else:
        examples = read_file(path)
    return (Example(_with_image(e.row, column, path.parent), e.place) if e.row else e for e in examples)


def _with_image(row: Row, column: str, folder: Path) -> Row:
    value = row.get(column)
    return {**row, column: ImageFile(folder / value)} if isinstance(value, str) and value else row


def _by_path(examples: Iterator[Example]) -> Iterator[Example]:
    """The place of an image that is a file is the file."""
    for example in examples:
        images = [value for value in (example.row or {}).values() if isinstance(value, StoredImage)]
        yield Example(example.row, str(images[0])) if images else example


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_endings() and path.is_file()


def _holds_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.rglob("*"))


def _expected(folder: Path) -> str:
    there = sorted(path.name for path in folder.iterdir())[:8]
    return f"expected a subfolder with images for each class; there is: {there}"


def _image_folder(folder: str | Path, **where: Any) -> Any:
    return _loaded(folder, "imagefolder", **where)


def _loaded(path: str | Path, builder: str, **where: Any) -> Any:
    import datasets

    try:
        with _without_bars():
            return datasets.load_dataset(builder, **where)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        kind = "image folder" if builder == "imagefolder" else f".{builder} file"
        raise ValueError(f"{path} cannot be read as an {kind}: {error.__cause__ or error}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
