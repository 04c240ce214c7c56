"""RowDataModule: rows read, split, chosen and batched, whatever they hold."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Generator, Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.core.problems import raise_problems
from lightning_peft.data.batching import LengthGroupedBatches, ResumableLoader, ranks
from lightning_peft.data.connection import ConnectedDataModule
from lightning_peft.data.files import Example, Files, Row
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.sources import named
from lightning_peft.data.splits import some_of, split_off

if TYPE_CHECKING:
    from lightning_peft.data.views import Look
    from lightning_peft.tasks.task import Task


class RowDataModule(ConnectedDataModule, ABC):
    """Reads rows from files or a source, and batches what a task makes of them.

    A subclass says where rows come from, and what is made of them.

    Args:
        source: a folder or a data set's name; unused where files are given.
        files: for ``"train"``, ``"validation"``, ``"test"`` and ``"predict"``, each perhaps None.
        columns: the data's name for each of the task's columns.
        batch_size: rows in a training batch.
        eval_batch_size: rows in other batches; None takes ``batch_size``.
        validation_fraction: the share of the training rows that validates where nothing else does; 0 trains on all.
        split_seed: fixes which.
        num_workers: processes that make batches; 0 does it in the main one.
        seed: fixes the training order and what ``limit`` takes.
        limit: a number of training rows, or a share of them below 1; None takes all.
        on_error: ``"raise"`` or ``"skip"``: what to do about rows that cannot be used.
        problems: sentences on what is wrong with the subclass's own options; None where nothing is.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        source: str | None,
        files: dict[str, Files | None],
        columns: dict[str, str | None] | None,
        batch_size: int,
        eval_batch_size: int | None,
        validation_fraction: float,
        split_seed: int,
        num_workers: int,
        seed: int,
        limit: float | None,
        on_error: Literal["raise", "skip"],
        problems: Sequence[str | None] = (),
    ) -> None:
        super().__init__(columns)
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        raise_problems(
            type(self).__name__,
            [
                *too_few(**counts),
                f"limit must be a number of rows, or a share above 0 and below 1, but got {limit}"
                if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit)))
                else None,
                "limit=1.0 could be one row or all of them: give 1 for one row, or leave it out for all"
                if isinstance(limit, float) and limit == 1
                else None,
                f"validation_fraction must be 0 or more and below 1, but got {validation_fraction}"
                if not 0 <= validation_fraction < 1
                else None,
                f"num_workers must be 0 or more, but got {num_workers}" if num_workers < 0 else None,
                f"on_error must be raise or skip, but got {on_error!r}" if on_error not in ("raise", "skip") else None,
                "give a source or train_files" if source is None and not any(files.values()) else None,
                *problems,
            ],
        )
        self.source = source
        self.files = files
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self.on_error = on_error
        self._examples: dict[str, list[Example]] = {}
        self._features: dict[str, Any] = {}

    @abstractmethod
    def _from_files(self, files: Files, split: str) -> Iterator[Example]:
        """The rows of files."""

    @abstractmethod
    def _from_source(self, source: str, split: str) -> Iterator[Example] | None:
        """The rows of the source, or None if it has no such split."""

    @abstractmethod
    def _prepared(self, examples: list[Example], problems: RowProblems, *, training: bool) -> Any:
        """A sequence of features, of all examples but those that problems take note of, unless the task joins rows."""

    @abstractmethod
    def _lengths(self, features: Any) -> Sequence[int]:
        """By what features are alike: those of like length are batched together."""

    @abstractmethod
    def look(self, sample: int | None) -> Look:
        """What is seen of the splits that `setup` has prepared, for `summarise`.

        Args:
            sample: rows of a split that may be looked at twice; None takes all.
        """

    @override
    def setup(self, stage: str) -> None:
        """Reads and prepares what the stage needs; everything wrong with the data is said here.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            TypeError: if the LightningModule has no task and processing class.
            ValueError: if rows cannot be used, and ``on_error`` is ``"raise"``.
        """
        self.connect_to_trainer()
        if stage == "predict" and self.files["predict"] is not None:
            self._examples["predict"] = self._all("predict", training=False) or []
        elif self._examples.keys().isdisjoint(("train", "validation")):
            self._read(stage)
        if stage == "validate" and "validation" not in self._examples:
            raise ValueError("there are no rows to validate with: give validation_files")
        if stage == "test" and "test" not in self._examples:
            self._examples["test"] = self._to_test()
        if stage == "predict" and "predict" not in self._examples:
            if "validation" not in self._examples:
                raise ValueError("there are no rows to predict: give predict_files or validation_files")
            self._examples["predict"] = self._examples["validation"]
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,)):
            if split in self._examples and (split == "predict" or split not in self._features):
                self._prepare(split, training=split != "predict")

    def _read(self, stage: str) -> None:
        train, validation = self._all("train"), self._all("validation")
        if train is not None:
            known = train  # before the split and the limit: a rare label may be in none of the rows that they leave
            if validation is None and self.validation_fraction:
                train, validation = self._split(train)
            self.task.learn_from([example.row or {} for example in known])
            self._examples["train"] = some_of(train, self.limit, self.seed)
        elif stage == "fit":
            raise ValueError(
                "there are no rows to train on: give train_files"
                if self.source is None
                else f"the data {self.source!r} has no train split"
            )
        if validation is not None:
            self._examples["validation"] = validation

    def _to_test(self) -> list[Example]:
        """The test rows, unless there are none, or the source keeps their labels to itself, as GLUE does."""
        wanted = {self.columns.get(c, c) for shape in self.task.columns for c in shape.targets}
        lacking = "there are no rows to test with"
        if self.files["test"] is None and _lack_all(self._source("test"), wanted):
            columns = " or ".join(map(repr, sorted(wanted)))
            lacking = f"no row of the test split of {self.source!r} has anything in the column {columns}"
        elif (found := self._all("test")) is not None:
            return found
        raise ValueError(
            f"{lacking}: give test_files; the rows that validate are evaluated by Trainer.validate, or split=validation"
        )

    def _split(self, train: list[Example]) -> tuple[list[Example], list[Example]]:
        return split_off(train, self.validation_fraction, self.inputs, self.split_seed)

    @property
    def inputs(self) -> list[str]:
        """The columns that the model sees, whatever shape the rows have."""
        return list(dict.fromkeys(c for s in self.task.columns for c in (*s.inputs, *s.optional)))

    def origin(self, split: str) -> Any:
        """The files, or the source, that a split comes from.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        """
        return self.files.get(split) or (self.files["train"] if split != "predict" else None) or self.source

    def _source(self, split: str) -> Iterator[Example] | None:
        files = self.files[split]
        if files is not None:
            return self._from_files(files, split)
        if self.files["train"] is not None or self.source is None:
            return None
        return self._from_source(self.source, split)

    def _all(self, split: str, *, training: bool = True) -> list[Example] | None:
        examples = self._source(split)
        if examples is None:
            return None
        problems = RowProblems(skip=self.on_error == "skip")
        found = list(named(examples, self.columns, self.task.columns, problems, training=training))
        what = f"data ({split}, {self.origin(split)})"
        problems.settle(what, len(found))
        if not found:
            raise ValueError(f"{what}: holds no example")
        return found

    def _prepare(self, split: str, *, training: bool) -> None:
        problems = RowProblems(skip=self.on_error == "skip")
        examples = self._examples[split]
        features = self._prepared(examples, problems, training=training)
        self._examples[split] = [e for e in examples if e.place not in problems.places]  # one for each row of features
        problems.settle(f"data ({split}, {self.origin(split)})", len(features))
        self._features[split] = features

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length, in an order that the seed and the epoch fix."""
        return self._shuffled(self._features["train"], self._order())

    def largest_batch(self, *, packed: bool = False) -> BatchSize:
        """The largest batch that a process trains on, once `setup` has prepared it.

        Args:
            packed: whether rows of text are put one behind the other, without padding.
        """
        count = -(-len(self._features["train"]) // ranks()[1])
        return BatchSize(min(self.batch_size, count), None, packed=False)

    def _order(self) -> LengthGroupedBatches:
        return LengthGroupedBatches(self._lengths(self._features["train"]), self.batch_size, self.seed)

    def _shuffled(self, rows: Any, order: LengthGroupedBatches) -> DataLoader[Any]:
        collate = self._collate(training=True)
        return ResumableLoader(rows, order, self.trainer, num_workers=self.num_workers, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows, in order; an empty list where all rows are trained on."""
        if "validation" in self._features:
            return self._in_order("validation", training=True)
        # Lightning asks whether that was the intention; somebody has asked for it
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows, in order."""
        return self._in_order("test", training=True)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """The rows to predict, in order, without labels."""
        return self._in_order("predict", training=False)

    def _in_order(self, split: str, *, training: bool) -> DataLoader[Any]:
        return DataLoader(
            self._features[split],
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=self._collate(training=training),
            generator=Generator(),  # what is drawn for workers is not drawn from what dropout goes by
        )

    def _collate(self, *, training: bool) -> Any:
        return functools.partial(_batch, task=self.task, processing_class=self.processing_class, training=training)

    def rows(self, split: str) -> list[Row]:
        """The rows of a split as they were read, under the task's names.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        """
        return [example.row or {} for example in self._examples[split]]

    def examples(self, split: str) -> list[Example]:
        """The rows of a split with their places.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        """
        return self._examples[split]

    def features(self, split: str) -> Any:
        """What the task has made of a split, row for row unless it joins rows.

        Args:
            split: one that `setup` has prepared.
        """
        return self._features[split]

    @property
    def splits(self) -> list[str]:
        """The splits that `setup` has prepared."""
        return list(self._features)


class BatchSize(NamedTuple):
    """A batch of rows of one length.

    Attributes:
        rows: how many.
        tokens: of each; None where rows are no texts.
        packed: whether that is the mean of rows that are packed, and not the longest to which they are padded.
    """

    rows: int
    tokens: int | None
    packed: bool


def _lack_all(examples: Iterable[Example] | None, columns: set[str]) -> bool:
    """Whether there are rows, and none of them has anything in any of the columns."""
    if examples is None or not columns:
        return False
    return all(e.row is not None and all(e.row.get(c) is None for c in columns) for e in examples)


def too_few(**counts: int | None) -> list[str]:
    """Sentences on counts below 1.

    Args:
        **counts: by the names of their options; None is none.
    """
    return [f"{n} must be 1 or more, but got {count}" for n, count in counts.items() if count is not None and count < 1]


def _batch(features: list[Any], *, task: Task, processing_class: Any, training: bool) -> dict[str, Tensor]:
    return task.collate(features, processing_class, training=training)
