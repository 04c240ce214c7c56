"""TextDataModule: text from the embedded data, local files or the hub, as batches for a task."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.data.batching import LengthGroupedBatches
from lightning_peft.data.docstrings import examples_with
from lightning_peft.data.encoding import LENGTH, Encoder, default_folder, kept_on_disk
from lightning_peft.data.files import Example, Files
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.rows import BatchSize, RowDataModule, too_few
from lightning_peft.data.sources import from_dataset, from_files, named
from lightning_peft.data.streaming import StreamedBatches

if TYPE_CHECKING:
    from lightning_peft.data.views import Look
    from lightning_peft.tasks.task import TextTask

MIN_LENGTH = 4  # tokens: two of text between those that begin and end it
LENGTH_OF_ROWS = 64  # tokens, where nothing says another number
BEGINNING = 1000  # rows of a stream that are looked at before it is trained on
_EMBEDDED = "docstrings"


class TextDataModule(RowDataModule):
    """Reads, tokenizes and batches text; the task says into what.

    Task and tokenizer come from the LightningModule that is trained (`PeftModule` has both), or from `connect`.

    Args:
        source: ``"docstrings"`` for the embedded data, a folder that ``datasets`` saved, or a data set's name on the
            hub; unused where files are given.
        train_files: one or several files (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, each also with .gz or
            .zst), folders of them, or patterns such as ``parts/*.jsonl``.
        validation_files: the same; without them a share of the training rows is split off.
        test_files: the same; the rows that are tested with.
        predict_files: the same; only the task's input columns are needed. Without them predicting uses the
            validation rows.
        columns: the data's name for each of the task's columns.
        batch_size: rows in a training batch.
        eval_batch_size: rows in other batches; None takes ``batch_size``.
        max_length: tokens that a row is cut to. None takes those of the adapter's training where a `PeftModule` is
            evaluated or predicts, and 64 else.
        validation_fraction: the share split off, below 1; equal inputs never land on both sides. 0 trains on all rows.
        split_seed: fixes which rows are split off; apart from ``seed``, so that runs with several seeds compare.
        num_workers: processes that collate; 0 does it in the main one.
        num_proc: processes that tokenize; 1 does it in the main one, where fast tokenizers use all cores anyway.
        seed: fixes the training order and what ``limit`` takes.
        limit: only so many training rows, or such a share of them below 1, chosen at random; None takes all.
        streaming: read the training rows again in each epoch instead of holding them, for data larger than memory.
        shuffle_buffer: rows among which a streamed order is shuffled.
        group_by_length: batch rows of similar length together, which saves padding. None does it unless the
            LightningModule runs its batches without padding: then only the largest batch would grow.
        on_error: what to do about rows that cannot be used: ``"raise"``, or ``"skip"``, which counts them.
        cache_dir: where token ids are kept for later runs; None takes ``lightning_peft/tokens`` in the user's folder
            for caches.

    Raises:
        ValueError: if an option is out of its range.
    """

    processing = "AutoTokenizer"

    def __init__(
        self,
        source: str | None = _EMBEDDED,
        train_files: Files | None = None,
        validation_files: Files | None = None,
        test_files: Files | None = None,
        predict_files: Files | None = None,
        columns: dict[str, str | None] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        num_workers: int = 0,
        num_proc: int = 1,
        seed: int = 0,
        limit: float | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        group_by_length: bool | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache_dir: str | Path | None = None,
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
            [
                *too_few(num_proc=num_proc, shuffle_buffer=shuffle_buffer),
                f"max_length must be {MIN_LENGTH} or more, but got {max_length}"
                if max_length is not None and max_length < MIN_LENGTH
                else None,
                "streaming reads in the main process: num_workers must be 0" if streaming and num_workers else None,
                "streaming takes all rows: leave limit out" if streaming and limit is not None else None,
            ],
        )
        self.max_length = LENGTH_OF_ROWS if max_length is None else max_length
        self._given_length = max_length
        self.num_proc = num_proc
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.group_by_length = group_by_length
        self.cache_dir = default_folder() if cache_dir is None else Path(cache_dir)
        self._beginnings: dict[int, tuple[list[Example], list[dict[str, Any]]]] = {}

    @property
    @override
    def task(self) -> TextTask:
        """The task."""
        task: TextTask = super().task
        return task

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None before `setup` or `connect`."""
        return self.processing_class

    @override
    def setup(self, stage: str) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        trained: int | None = None if stage == "fit" else getattr(module, "trained_max_length", None)
        length = self._given_length or trained or LENGTH_OF_ROWS
        if length != self.max_length:  # what was prepared for another adapter is cut elsewhere
            self.max_length = length
            self._features.clear()
            self._beginnings.clear()
        super().setup(stage)

    @override
    def _from_files(self, files: Files, split: str) -> Iterator[Example]:
        return from_files(files, whole_texts=self.task.whole_texts and split != "predict")

    @override
    def _from_source(self, source: str, split: str) -> Iterator[Example] | None:
        if source != _EMBEDDED:
            return from_dataset(source, split, streaming=self.streaming)
        shape = self.task.columns[0]
        train, validation = examples_with(*shape.inputs, *shape.targets)
        rows = {"train": train, "validation": validation}.get(split)
        return None if rows is None else (Example(dict(row), f"docstring {i}") for i, row in enumerate(rows, start=1))

    @override
    def _read(self, stage: str) -> None:
        if self.streaming:
            self._read_streamed()
        else:
            super()._read(stage)

    def _read_streamed(self) -> None:
        """Everything but the training rows, whose labels the others tell."""
        validation = self._all("validation")
        if validation is not None:
            self.task.learn_from([example.row or {} for example in validation])
            self._examples["validation"] = validation
        elif self.validation_fraction:
            raise ValueError(
                "streaming cannot split rows off that it does not hold; give validation_files, or validation_fraction=0"
            )
        if self._source("train") is None:
            raise ValueError(f"the data {self.source!r} has no train split that could be streamed")
        if not self.beginning()[1]:
            raise ValueError(f"data (train, {self.origin('train')}): holds no example")

    def _streamed(self, problems: RowProblems) -> Iterator[dict[str, Any]]:
        """The training features from the first on."""
        examples = self._source("train")
        assert examples is not None  # as was seen when the data was set up
        rows = named(examples, self.columns, self.task.columns, problems, training=True)
        return Encoder(self.task, self.tokenizer, self.max_length, training=True).stream(rows, problems)

    @override
    def _prepared(self, examples: list[Example], problems: RowProblems, *, training: bool) -> Any:
        encoder = Encoder(self.task, self.tokenizer, self.max_length, training=training)
        return kept_on_disk(encoder, examples, problems, self.cache_dir, self.num_proc)

    @override
    def _lengths(self, features: Any) -> Sequence[int]:
        lengths: list[int] = features[LENGTH][:].tolist()
        return lengths

    @override
    def largest_batch(self, *, packed: bool = False) -> BatchSize:
        if self.streaming:
            return BatchSize(self.batch_size, self.max_length, packed=False)
        lengths = self._lengths(self.features("train"))
        rows, longest = super().largest_batch().rows, max(lengths)
        if packed:
            # rows of all lengths come together: those of the first epoch
            order = LengthGroupedBatches([1] * len(lengths), self.batch_size, self.seed)
            mean = -(-max(sum(lengths[i] for i in batch) for batch in order) // rows)
            if mean < longest:
                return BatchSize(rows, mean, packed=True)
        return BatchSize(rows, longest, packed=False)

    @override
    def _order(self) -> LengthGroupedBatches:
        lengths = self._lengths(self.features("train"))
        groups = self.group_by_length
        if groups is None:
            module: Any = getattr(self.trainer, "lightning_module", None)
            groups = not getattr(module, "runs_without_padding", False)
        return LengthGroupedBatches(lengths if groups else [1] * len(lengths), self.batch_size, self.seed)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that the seed and the epoch fix, of similar length unless they are packed."""
        if not self.streaming:
            return super().train_dataloader()
        problems = RowProblems(skip=self.on_error == "skip")
        stream = functools.partial(self._streamed, problems)
        rows = StreamedBatches(
            stream, self.batch_size, self.shuffle_buffer, self.seed, trainer=self.trainer, problems=problems
        )
        return DataLoader(rows, batch_size=None, collate_fn=self._collate(training=True))

    @override
    def look(self, sample: int | None) -> Look:
        from lightning_peft.data.text_views import look_at_texts

        return look_at_texts(self, sample)

    def table(self, split: str) -> Any:
        """The features of a split, a ``pyarrow.Table``.

        Args:
            split: one that `setup` has prepared.
        """
        return self.features(split).with_format("arrow")[:]

    def beginning(self, rows: int = BEGINNING) -> tuple[list[Example], list[dict[str, Any]]]:
        """The first rows of a streamed training split that can be used, and their features; read once.

        Args:
            rows: how many.
        """
        if rows not in self._beginnings:
            problems = RowProblems(skip=True)
            stream = named(self._source("train") or (), self.columns, self.task.columns, problems, training=True)
            examples = list(islice(stream, rows))
            encoder = Encoder(self.task, self.tokenizer, self.max_length, training=True)
            features = list(encoder.stream(examples, problems))
            self._beginnings[rows] = [e for e in examples if e.place not in problems.places], features
        return self._beginnings[rows]
