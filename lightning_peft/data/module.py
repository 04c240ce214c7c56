"""TextDataModule: text from the embedded data, local files or the hub, as batches for a task."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.data.batching import LengthGroupedBatches, ResumableLoader
from lightning_peft.data.docstrings import examples_with
from lightning_peft.data.encoding import LENGTH, Encoder, default_folder, kept_on_disk
from lightning_peft.data.files import Example, Files, Row
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.sources import ID, from_dataset, from_files, named
from lightning_peft.data.splits import some_of, split_off
from lightning_peft.data.streaming import StreamedBatches

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task

MIN_LENGTH = 4  # tokens: two of text between those that begin and end it
_EMBEDDED = "docstrings"


class TextDataModule(LightningDataModule):
    """Reads, tokenizes and batches text; the task says into what.

    Task and tokenizer come from the LightningModule that is trained (`PeftModule` has both), or from `connect`.

    Args:
        source: ``"docstrings"`` for the embedded data, a folder that ``datasets`` saved, or a data set's name on the
            hub; unused where files are given.
        train_files: one or several files (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, each also with .gz or
            .zst), folders of them, or patterns such as ``parts/*.jsonl``.
        validation_files: the same; without them a share of the training rows is split off.
        test_files: the same; without them testing uses the validation rows.
        predict_files: the same; only the task's input columns are needed. Without them predicting uses the
            validation rows.
        columns: the data's name for each of the task's columns.
        batch_size: rows in a training batch.
        eval_batch_size: rows in other batches; None takes ``batch_size``.
        max_length: tokens that a row is cut to.
        validation_fraction: the share split off, above 0 and below 1; equal inputs never land on both sides.
        split_seed: fixes which rows are split off; apart from ``seed``, so that runs with several seeds compare.
        num_workers: processes that collate; 0 does it in the main one.
        num_proc: processes that tokenize; 1 does it in the main one, where fast tokenizers use all cores anyway.
        seed: fixes the training order and what ``limit`` takes.
        limit: only so many training rows, or such a share of them below 1, chosen at random; None takes all.
        streaming: read the training rows again in each epoch instead of holding them, for data larger than memory.
        shuffle_buffer: rows among which a streamed order is shuffled.
        on_error: what to do about rows that cannot be used: ``"raise"``, or ``"skip"``, which counts them.
        cache_dir: where token ids are kept for later runs; None takes ``lightning_peft/tokens`` in the user's folder
            for caches.

    Raises:
        ValueError: if an option is out of its range.
    """

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
        max_length: int = 64,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        num_workers: int = 0,
        num_proc: int = 1,
        seed: int = 0,
        limit: float | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        on_error: Literal["raise", "skip"] = "raise",
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "num_proc": num_proc,
            "shuffle_buffer": shuffle_buffer,
        }
        raise_problems(
            "TextDataModule",
            [
                *(f"{n} must be 1 or more, but got {v}" for n, v in counts.items() if v is not None and v < 1),
                f"limit must be a number of rows, or a share above 0 and below 1, but got {limit}"
                if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit)))
                else None,
                f"max_length must be {MIN_LENGTH} or more, but got {max_length}" if max_length < MIN_LENGTH else None,
                f"validation_fraction must be above 0 and below 1, but got {validation_fraction}"
                if not 0 < validation_fraction < 1
                else None,
                f"num_workers must be 0 or more, but got {num_workers}" if num_workers < 0 else None,
                "streaming reads in the main process: num_workers must be 0" if streaming and num_workers else None,
                "streaming takes all rows: leave limit out" if streaming and limit is not None else None,
                f"on_error must be raise or skip, but got {on_error!r}" if on_error not in ("raise", "skip") else None,
                "give a source or train_files" if source is None and not train_files and not predict_files else None,
            ],
        )
        self.source = source
        self.files = {
            "train": train_files,
            "validation": validation_files,
            "test": test_files,
            "predict": predict_files,
        }
        self.columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.seed = seed
        self.limit = limit
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.on_error = on_error
        self.cache_dir = default_folder() if cache_dir is None else Path(cache_dir)
        self._task: Task | None = None
        self._tokenizer: Any = None
        self._examples: dict[str, list[Example]] = {}
        self._features: dict[str, Any] = {}

    def connect(self, task: Task, tokenizer: Any) -> None:
        """Says which task and tokenizer the text is for, where no trainer does.

        Args:
            task: the task.
            tokenizer: a Hugging Face tokenizer.

        Raises:
            ValueError: if ``columns`` names one that the task does not know.
        """
        known = {ID, *(column for shape in task.columns for column in shape.all())}
        unknown = [c for c in self.columns if c not in known]
        if unknown:
            raise ValueError(f"columns: the task knows no column {unknown[0]!r}{nearest(unknown[0], known)}")
        self._task, self._tokenizer = task, tokenizer

    @property
    def task(self) -> Task:
        """The task.

        Raises:
            RuntimeError: before `setup` or `connect`.
        """
        if self._task is None:
            raise RuntimeError("the data knows no task yet; call connect(task, tokenizer), or let a Trainer run setup")
        return self._task

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None before `setup` or `connect`."""
        return self._tokenizer

    @override
    def setup(self, stage: str) -> None:
        """Reads and tokenizes what the stage needs; everything wrong with the data is said here.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            TypeError: if the LightningModule has no task and tokenizer.
            ValueError: if rows cannot be used, and ``on_error`` is ``"raise"``.
        """
        if self._task is None:
            module: Any = getattr(self.trainer, "lightning_module", None)
            if not hasattr(module, "task") or not hasattr(module, "tokenizer"):
                raise TypeError(
                    f"TextDataModule needs a LightningModule with the attributes task and tokenizer, as PeftModule "
                    f"has them, but got {type(module).__name__}; or call connect(task, tokenizer)"
                )
            self.connect(module.task, module.tokenizer)
        if stage == "predict" and self.files["predict"] is not None:
            self._examples["predict"] = self._all("predict", training=False) or []
        elif not self._examples.get("validation"):
            self._read()
        splits = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split in splits.get(stage, ()):
            if split not in self._features and split in self._examples:
                self._features[split] = self._encode(split, training=True)
        if stage == "predict":
            self._examples.setdefault("predict", self._examples.get("validation", []))
            self._features["predict"] = self._encode("predict", training=False)

    def _read(self) -> None:
        if self.streaming:
            self._read_streamed()
            return
        train, validation = self._all("train"), self._all("validation")
        if self.source == _EMBEDDED and self.files["train"] is None:
            shape = self.task.columns[0]
            rows = examples_with(*shape.inputs, *shape.targets)
            train, embedded = ([Example(r, f"docstring {i}") for i, r in enumerate(part, 1)] for part in rows)
            validation = validation or embedded
        if train is None:
            raise ValueError(f"the data {self.source!r} has no train split")
        known = train  # before the split and the limit: a rare label may be in none of the rows that they leave
        if validation is None:
            train, validation = split_off(train, self.validation_fraction, self.inputs, self.split_seed)
        self.task.learn_from([example.row or {} for example in known])
        test = self._all("test") or validation
        self._examples |= {
            "train": some_of(train, self.limit, self.seed),
            "validation": validation,
            "test": test,
        }

    def _read_streamed(self) -> None:
        """Everything but the training rows, whose labels the others tell."""
        validation = self._all("validation")
        if validation is None:
            raise ValueError("streaming cannot split rows off that it does not hold; give validation_files")
        self.task.learn_from([example.row or {} for example in validation])
        self._examples |= {"validation": validation, "test": self._all("test") or validation}
        if next(self._streamed(RowProblems(skip=True)), None) is None:
            raise ValueError(f"data (train, {self.origin('train')}): holds no example")

    def _streamed(self, problems: RowProblems) -> Iterator[dict[str, Any]]:
        """The training features from the first on."""
        examples = self._source("train")
        if examples is None:
            raise ValueError(f"the data {self.source!r} has no train split that could be streamed")
        rows = named(examples, self.columns, self.task.columns, problems, training=True)
        return Encoder(self.task, self._tokenizer, self.max_length, training=True).stream(rows, problems)

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
            return from_files(files, whole_texts=self.task.whole_texts and split != "predict")
        if self.files["train"] is not None or self.source in (None, _EMBEDDED):
            return None
        return from_dataset(str(self.source), split, streaming=self.streaming)

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

    def _encode(self, split: str, *, training: bool) -> Any:
        problems = RowProblems(skip=self.on_error == "skip")
        encoder = Encoder(self.task, self._tokenizer, self.max_length, training=training)
        examples = self._examples[split]
        features = kept_on_disk(encoder, examples, problems, self.cache_dir, self.num_proc)
        self._examples[split] = [e for e in examples if e.place not in problems.places]  # one for each row of features
        problems.settle(f"data ({split}, {self.origin(split)})", len(features))
        return features

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length, in an order that the seed and the epoch fix."""
        collate = self._collate(training=True)
        if self.streaming:
            problems = RowProblems(skip=self.on_error == "skip")
            stream = functools.partial(self._streamed, problems)
            rows = StreamedBatches(
                stream, self.batch_size, self.shuffle_buffer, self.seed, trainer=self.trainer, problems=problems
            )
            return DataLoader(rows, batch_size=None, collate_fn=collate)
        features = self._features["train"]
        batches = LengthGroupedBatches(features[LENGTH][:].tolist(), self.batch_size, self.seed)
        return ResumableLoader(features, batches, self.trainer, num_workers=self.num_workers, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """The validation rows, in order."""
        return self._in_order("validation", training=True)

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
        )

    def _collate(self, *, training: bool) -> Any:
        return functools.partial(self.task.collate, tokenizer=self._tokenizer, training=training)

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
        """The token ids and labels of a split, a `datasets.Dataset`, row for row unless the task joins rows.

        Args:
            split: one that `setup` has encoded.
        """
        return self._features[split]

    @property
    def splits(self) -> list[str]:
        """The splits that `setup` has encoded."""
        return list(self._features)

    def beginning(self, rows: int) -> tuple[list[Example], list[dict[str, Any]]]:
        """The first rows of a streamed training split that can be used, and their features.

        Args:
            rows: how many.
        """
        problems = RowProblems(skip=True)
        stream = named(self._source("train") or (), self.columns, self.task.columns, problems, training=True)
        examples = list(islice(stream, rows))
        encoder = Encoder(self.task, self._tokenizer, self.max_length, training=True)
        features = list(encoder.stream(examples, problems))
        return [e for e in examples if e.place not in problems.places], features
