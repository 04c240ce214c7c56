"""Rows as token ids: in parallel, kept on disk under a key made of data, tokenizer and settings."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import transformers

from lightning_peft.data.emptiness import refuse_empty
from lightning_peft.data.files import Example, Row
from lightning_peft.data.problems import RowProblems
from lightning_peft.formats.writing import written_file
from lightning_peft.tasks.task import Joining

if TYPE_CHECKING:
    from lightning_peft.tasks.task import TextTask

T = TypeVar("T")

LENGTH = "length"
"""The feature by which rows of similar length are found: that of the longest list of a row."""

_CHUNK = 1000
# What transformers keeps beside the tokenizer's own file and tells it when it is called: which end is cut, what comes
# back, whether special tokens are read in a text, and the languages of NLLB's and mBART's kind
_SET_AT_A_CALL = ("truncation_side", "model_input_names", "split_special_tokens", "src_lang", "tgt_lang")
_FORM = 5  # of the files and what is refused; another number makes those of before unknown


class Encoder:
    """Turns examples into features as a task says.

    Args:
        task: the task.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens that a row is cut to.
        training: with what is to be learnt; otherwise the inputs alone.
    """

    def __init__(self, task: TextTask, tokenizer: Any, max_length: int, *, training: bool) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.training = training

    @property
    def joins(self) -> bool:
        """Whether features are made of several rows."""
        return self.training and isinstance(self.task, Joining)

    def stream(self, examples: Iterable[Example], problems: RowProblems, num_proc: int = 1) -> Iterator[dict[str, Any]]:
        """Features one after the other.

        Args:
            examples: rows with the task's columns.
            problems: takes note of those that the task refuses.
            num_proc: processes that share the work; 1 does it here. Fast tokenizers use all cores by themselves.
        """
        chunks = in_chunks(examples)
        many = num_proc > 1
        context = multiprocessing.get_context("spawn")  # a forked tokenizer deadlocks once it has used its threads
        workers = ProcessPoolExecutor(num_proc, context, _keep, (self,)) if many else nullcontext()
        with workers as pool:
            done = map(self.chunk, chunks) if pool is None else pool.map(_chunk_of_kept, chunks)
            features: Iterator[dict[str, Any]] = (f for found, wrong in done for f in _noting(found, wrong, problems))
            if self.joins:
                assert isinstance(self.task, Joining)
                features = self.task.join(features, self.tokenizer, self.max_length)
            for feature in features:
                yield {**feature, LENGTH: max((len(v) for v in feature.values() if isinstance(v, list)), default=1)}

    def chunk(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """Features of some examples, and the place of each that cannot be used with a sentence on it."""
        return told_apart(examples, self._encode)

    def _encode(self, rows: list[Row]) -> list[dict[str, Any]]:
        features = self.task.encode(rows, self.tokenizer, self.max_length, training=self.training)
        if not self.joins:  # an empty line of a running text is none to complain of
            for feature in features:
                refuse_empty(feature, self.tokenizer, self.max_length, training=self.training)
        return features

    def key(self, examples: Sequence[Example]) -> str:
        """A hash of all that the features depend on."""
        settings = [self.task.to_config(), self.max_length, self.training, _FORM, transformers.__version__]
        found = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        found.update(_tokenizer_key(self.tokenizer).encode())
        for example in examples:
            found.update(json.dumps(example.row, default=str).encode())
        return found.hexdigest()


# Of a worker process: a tokenizer takes longer to send and to build than a chunk to encode, so it goes there once
_kept: list[Encoder] = []


def _keep(encoder: Encoder) -> None:
    _kept.append(encoder)


def _chunk_of_kept(examples: Sequence[Example]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    return _kept[0].chunk(examples)


def in_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """A thousand at a time.

    Args:
        items: whatever they are.
    """
    left = iter(items)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk


def told_apart(
    examples: Sequence[Example], encode: Callable[[list[Row]], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Features of examples, and the place of each that cannot be used with a sentence on it.

    Args:
        examples: some of them.
        encode: makes features of rows; raises a ValueError if one of them cannot be used.
    """
    rows = [example.row or {} for example in examples]
    try:
        return encode(rows), []
    except ValueError:  # one at a time, to know which
        found, wrong = [], []
        for row, example in zip(rows, examples, strict=True):
            try:
                found += encode([row])
            except ValueError as error:
                wrong.append((example.place, str(error)))
        return found, wrong


def _noting(found: list[dict[str, Any]], wrong: list[tuple[str, str]], problems: RowProblems) -> list[dict[str, Any]]:
    for place, sentence in wrong:
        problems.add(place, f" {sentence}")
    return found


def _tokenizer_key(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template]
    parts += [getattr(tokenizer, name, None) for name in _SET_AT_A_CALL]
    if backend is None:
        parts.append(sorted(tokenizer.get_vocab().items()))
    else:  # how the last call was to cut and pad is no part of it
        parts.append({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return json.dumps(parts, default=str)


def kept_on_disk(
    encoder: Encoder, examples: Sequence[Example], problems: RowProblems, folder: Path, num_proc: int
) -> Any:
    """Features as a `datasets.Dataset` in a memory-mapped file, made now or by an earlier run.

    Args:
        encoder: what makes them.
        examples: rows with the task's columns.
        problems: takes note of those that the task refuses. Then nothing is kept for other runs.
        folder: where such files lie.
        num_proc: processes that share the work.
    """
    import datasets
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{encoder.key(examples)}.arrow"
    with FileLock(f"{path}.lock"):  # of several ranks one does the work
        if not path.is_file():
            _write(path, encoder.stream(examples, problems, num_proc))
        found = datasets.Dataset.from_file(str(path)).with_format("numpy")
        if problems.count:
            path.unlink()  # the open file stays readable
    return found


def _write(path: Path, features: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa

    with written_file(path) as scratch, scratch.open("wb") as file:
        writer = schema = None
        for chunk in in_chunks(features):
            table = pa.Table.from_pylist(chunk)
            if writer is None:
                schema = pa.schema([(f.name, _compact(f.type)) for f in table.schema])
                writer = pa.ipc.new_stream(file, schema)
            writer.write_table(table.cast(schema))
        if writer is None:
            writer = pa.ipc.new_stream(file, pa.schema([(LENGTH, pa.int64())]))
        writer.close()


def _compact(kind: Any) -> Any:
    """Token ids take 32 bits."""
    import pyarrow as pa

    if not pa.types.is_list(kind):
        return kind
    return pa.list_(pa.float32() if pa.types.is_floating(kind.value_type) else pa.int32())


def default_folder() -> Path:
    """Where token ids are kept unless told otherwise: ``lightning_peft/tokens`` in the user's folder for caches."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning_peft" / "tokens"
