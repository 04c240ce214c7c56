"""ImageDataModule: images from folders, files or the hub, as batches for a task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_peft.core.problems import an
from lightning_peft.data.batching import LengthGroupedBatches
from lightning_peft.data.encoding import in_chunks, told_apart
from lightning_peft.data.files import Example, Files, Row
from lightning_peft.data.image_sources import from_image_files, from_image_source
from lightning_peft.data.images import StoredImage, look_at
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.rows import RowDataModule

if TYPE_CHECKING:
    from PIL.Image import Image

    from lightning_peft.data.views import Look
    from lightning_peft.tasks.task import ImageTask

IMAGE = "image"
"""The column, and the feature, with the image."""

Transform = Callable[["Image"], "Image"]


class ImageDataModule(RowDataModule):
    """Reads images, changes and batches them; the task says what is learnt of them.

    Task and image processor come from the LightningModule that is trained (`PeftModule` has both), or from `connect`.
    Images are opened when a batch needs them, in the processes of ``num_workers``; before training all of them are
    looked at once, so that one that does not open is named then.

    Args:
        source: a folder with a subfolder of images for each class, perhaps below ``train``, ``validation`` and
            ``test``, or with a ``metadata.csv`` or ``metadata.jsonl``; a folder that ``datasets`` saved; or a data
            set's name on the hub. Unused where files are given.
        train_files: one or several folders of images, or files (.jsonl, .json, .csv, .tsv, .parquet, .arrow) whose
            column ``image`` holds paths, relative to the file's folder, or in tables the images' bytes; or patterns.
        validation_files: the same; without them a share of the training rows is split off.
        test_files: the same; the rows that are tested with.
        predict_files: the same, or images, such as ``photos/*.jpg``. Without them predicting uses the validation rows.
        columns: the data's name for each of the task's columns.
        batch_size: images in a training batch.
        eval_batch_size: images in other batches; None takes ``batch_size``.
        validation_fraction: the share split off, below 1; images of the same bytes never land on both sides. 0 trains
            on all images.
        split_seed: fixes which rows are split off; apart from ``seed``, so that runs with several seeds compare.
        num_workers: processes that open images; 0 does it in the main one.
        seed: fixes the training order, what ``limit`` takes, and what is random in ``transform``.
        limit: only so many training images, or such a share of them below 1, chosen at random; None takes all.
        transform: changes a training image before the image processor gets it: anything that takes an image of Pillow
            and gives one, such as ``torchvision.transforms.v2.RandomHorizontalFlip()``. What it draws from the random
            states of Python, NumPy and torch depends on seed, epoch and image alone.
        on_error: what to do about rows that cannot be used: ``"raise"``, or ``"skip"``, which counts them.

    Raises:
        ValueError: if an option is out of its range.
        TypeError: if ``transform`` cannot be called.
    """

    processing = "AutoImageProcessor"

    def __init__(
        self,
        source: str | None = None,
        train_files: Files | None = None,
        validation_files: Files | None = None,
        test_files: Files | None = None,
        predict_files: Files | None = None,
        columns: dict[str, str | None] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        limit: float | None = None,
        transform: Transform | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(
            source,
            {"train": train_files, "validation": validation_files, "test": test_files, "predict": predict_files},
            columns,
            batch_size,
            eval_batch_size,
            validation_fraction,
            split_seed,
            num_workers,
            seed,
            limit,
            on_error,
        )
        if transform is not None and not callable(transform):
            raise TypeError(
                f"transform must take an image and give one, such as a transform of torchvision, but got {transform!r}"
            )
        self.transform = transform

    @property
    @override
    def task(self) -> ImageTask:
        """The task."""
        task: ImageTask = super().task
        return task

    @override
    def _from_files(self, files: Files, split: str) -> Iterator[Example]:
        return from_image_files(files, self.columns.get(IMAGE, IMAGE))

    @override
    def _from_source(self, source: str, split: str) -> Iterator[Example] | None:
        return from_image_source(source, split)

    @override
    def _split(self, train: list[Example]) -> tuple[list[Example], list[Example]]:
        look_at(_images(train))  # equal images are known by their bytes
        return super()._split(train)

    @override
    def _prepared(self, examples: list[Example], problems: RowProblems, *, training: bool) -> ImageRows:
        look_at(_images(examples))
        for example in examples:
            _note(example, problems)
        fine = [example for example in examples if example.place not in problems.places]
        features: list[dict[str, Any]] = []
        for some in in_chunks(fine):
            found, wrong = told_apart(some, lambda rows: self.task.encode(rows, training=training))
            features += found
            for place, sentence in wrong:
                problems.add(place, f" {sentence}")
        left = _images([example for example in fine if example.place not in problems.places])
        return ImageRows(left, features)

    @override
    def _lengths(self, features: ImageRows) -> Sequence[int]:
        return [1] * len(features)  # the image processor makes them alike

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that the seed and the epoch fix, of images that ``transform`` has changed."""
        order = self._order()
        return self._shuffled(self._changed(order), order)

    @property
    def train_rows(self) -> ImageRows:
        """The training rows as the first epoch has them."""
        return self._changed(self._order())

    def _changed(self, order: LengthGroupedBatches) -> ImageRows:
        rows: ImageRows = self._features["train"]
        return rows if self.transform is None else rows.changed(self.transform, order)

    @override
    def look(self, sample: int | None) -> Look:
        from lightning_peft.data.image_views import look_at_images

        return look_at_images(self)

    @override
    def rows(self, split: str) -> list[Row]:
        """The rows of a split under the task's names; of an image its path, or its place in its table.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        """
        return [{**row, IMAGE: str(row[IMAGE])} for row in super().rows(split)]


class ImageRows(Dataset[dict[str, Any]]):
    """Images with what belongs to them, opened when they are asked for.

    Args:
        images: where they lie.
        features: the rest of each row.
        transform: changes an image.
        order: its seed and its epoch fix what the transform draws.
    """

    def __init__(
        self,
        images: Sequence[StoredImage],
        features: Sequence[dict[str, Any]],
        transform: Transform | None = None,
        order: LengthGroupedBatches | None = None,
    ) -> None:
        self.images, self.others = images, features
        self.transform, self.order = transform, order

    def changed(self, transform: Transform, order: LengthGroupedBatches) -> ImageRows:
        """The same rows with changed images.

        Args:
            transform: changes an image.
            order: the order in which they are trained on.
        """
        return ImageRows(self.images, self.others, transform, order)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self.images[row].open()
        if self.transform is not None and self.order is not None:
            with _drawing(f"{self.order.seed}-{self.order.epoch}-{row}"):
                image = self.transform(image)
        return {IMAGE: image, **self.others[row]}


def _images(examples: Sequence[Example]) -> list[StoredImage]:
    values = [(example.row or {})[IMAGE] for example in examples]
    return [value for value in values if isinstance(value, StoredImage)]


def _note(example: Example, problems: RowProblems) -> None:
    """Takes note of an example without an image, or with one that cannot be opened."""
    image = (example.row or {})[IMAGE]
    if not isinstance(image, StoredImage):
        problems.add(
            example.place, f" has {an(type(image).__name__)} as its image; expected a path, or an image's bytes"
        )
    elif image.seen.problem:
        which = "" if example.place == str(image) else f" names the image {str(image)!r}, which"
        problems.add(example.place, f"{which} cannot be opened: {image.seen.problem}")


@contextmanager
def _drawing(words: str) -> Iterator[None]:
    """Draws of the random states that transforms use depend on some words alone, and leave no trace."""
    number = random.Random(words).getrandbits(32)
    before, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)
