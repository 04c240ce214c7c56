"""TextDataModule: text from the embedded data, local files or the hub, as batches for a task."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.core.problems import raise_problems
from lightning_peft.data.batching import LengthGroupedBatches, ResumableLoader
from lightning_peft.data.docstrings import classification_examples, completion_examples
from lightning_peft.data.sources import Row, read_files, read_hub

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task

MIN_LENGTH = 4  # tokens: two of text between those that begin and end it
_SPLIT_SEED = 0
_EMBEDDED = "docstrings"


class TextDataModule(LightningDataModule):
    """Reads, tokenizes and batches text; the task says into what.

    Task and tokenizer come from the LightningModule that is trained (`PeftModule` has both), or from `connect`.

    Args:
        source: ``"docstrings"`` for the embedded data, or a data set's name on the hub; unused where files are given.
        train_files: one or several .jsonl, .json, .csv or .parquet files.
        validation_files: the same; without them a share of the training rows is split off.
        test_files: the same; without them testing uses the validation rows.
        predict_files: the same; only the task's input columns are needed. Without them predicting uses the
            validation rows.
        columns: the data's name for each of our columns (``text``, ``label``, ``prompt``, ``completion``).
        batch_size: rows in a training batch.
        eval_batch_size: rows in other batches; None takes ``batch_size``.
        max_length: tokens that a row is cut to.
        validation_fraction: the share split off, above 0 and below 1; equal inputs never land on both sides.
        num_workers: processes that collate; 0 does it in the main one.
        seed: fixes the training order and what ``limit`` takes.
        limit: only so many training rows, chosen at random; None takes all.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        source: str | None = _EMBEDDED,
        train_files: str | Path | list[str] | list[Path] | None = None,
        validation_files: str | Path | list[str] | list[Path] | None = None,
        test_files: str | Path | list[str] | list[Path] | None = None,
        predict_files: str | Path | list[str] | list[Path] | None = None,
        columns: dict[str, str | None] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int = 64,
        validation_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "limit": limit}
        raise_problems(
            "TextDataModule",
            [
                *(f"{n} must be 1 or more, but got {v}" for n, v in numbers.items() if v is not None and v < 1),
                f"max_length must be {MIN_LENGTH} or more, but got {max_length}" if max_length < MIN_LENGTH else None,
                f"validation_fraction must be above 0 and below 1, but got {validation_fraction}"
                if not 0 < validation_fraction < 1
                else None,
                f"num_workers must be 0 or more, but got {num_workers}" if num_workers < 0 else None,
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
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self._task: Task | None = None
        self._tokenizer: Any = None
        self._rows: dict[str, list[Row]] = {}
        self._features: dict[str, list[dict[str, Any]]] = {}

    def connect(self, task: Task, tokenizer: Any) -> None:
        """Says which task and tokenizer the text is for, where no trainer does.

        Args:
            task: the task.
            tokenizer: a Hugging Face tokenizer.
        """
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

    @override
    def setup(self, stage: str) -> None:
        """Reads and tokenizes what the stage needs; everything wrong with the data is said here.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            TypeError: if the LightningModule has no task and tokenizer.
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
            self._load_predictions()
        else:
            self._load_labelled(stage)

    def _load_predictions(self) -> None:
        files = self.files["predict"]
        assert files is not None
        self._rows["predict"] = read_files(files, self.columns, self.task.input_columns)
        self._features["predict"] = self._encode("predict", training=False)

    def _load_labelled(self, stage: str) -> None:
        if not self._rows.get("validation"):
            self._rows |= self._read()
        needed = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split in needed.get(stage, ()):
            if split not in self._features:
                self._features[split] = self._encode(split, training=True)
        if stage == "predict":
            self._rows["predict"] = self._rows["validation"]
            self._features["predict"] = self._encode("predict", training=False)

    def _read(self) -> dict[str, list[Row]]:
        required = self.task.required_columns
        train = self._split("train", required)
        if train is None:
            raise ValueError(f"the data {self.source!r} has no train split")
        validation = self._split("validation", required)
        if self.source == _EMBEDDED and self.files["train"] is None:
            train, embedded = classification_examples() if "label" in required else completion_examples()
            validation = validation or embedded
        known = train  # before the split and the limit: a rare label may be in none of the rows that they leave
        if validation is None:
            train, validation = self._split_off(train)
        self.task.learn_from(known)
        if self.limit is not None:
            train = random.Random(self.seed).sample(train, min(self.limit, len(train)))
        test = self._split("test", required) or validation
        return {"train": train, "validation": validation, "test": test}

    def _split(self, split: str, required: tuple[str, ...]) -> list[Row] | None:
        files = self.files[split]
        if files is not None:
            return read_files(files, self.columns, required)
        if self.files["train"] is not None or self.source is None:
            return None
        if self.source == _EMBEDDED:
            return [] if split == "train" else None
        return read_hub(self.source, split, self.columns, required)

    def _split_off(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault("\0".join(str(row[c]) for c in self.task.input_columns), []).append(row)
        keys = sorted(groups)
        random.Random(_SPLIT_SEED).shuffle(keys)
        validation: list[Row] = []
        while len(keys) > 1 and len(validation) < self.validation_fraction * len(rows):
            validation += groups.pop(keys.pop())
        train = [row for row in rows if "\0".join(str(row[c]) for c in self.task.input_columns) in groups]
        if not train or not validation:
            columns = " and ".join(repr(c) for c in self.task.input_columns)
            what = "1 row is" if len(rows) == 1 else f"{len(rows)} rows that all have the same {columns} are"
            raise ValueError(
                f"{what} too few to split into training and validation: rows with equal inputs stay on one side; give "
                "other rows, or validation_files"
            )
        return train, validation

    def _encode(self, split: str, *, training: bool) -> list[dict[str, Any]]:
        try:
            return self.task.encode(self._rows[split], self._tokenizer, self.max_length, training=training)
        except ValueError as error:
            where = self.files.get(split) or (self.files["train"] if split != "predict" else None) or self.source
            raise ValueError(f"data ({split}, {where}): {error}") from error

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Batches of similar length, in an order that the seed and the epoch fix."""
        features = self._features["train"]
        batches = LengthGroupedBatches([len(f["input_ids"]) for f in features], self.batch_size, self.seed)
        collate = self._collate(training=True)
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
            self._features[split],  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=self._collate(training=training),
        )

    def _collate(self, *, training: bool) -> Any:
        return functools.partial(self.task.collate, tokenizer=self._tokenizer, training=training)

    def rows(self, split: str) -> list[Row]:
        """The rows of a split as they were read.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"`` or ``"predict"``.
        """
        return self._rows[split]
