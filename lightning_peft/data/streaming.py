"""Batches of rows that are read again in each epoch, for data larger than memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_peft.data.batching import progress_of, ranks
from lightning_peft.data.problems import RowProblems


class StreamedBatches(IterableDataset[list[dict[str, Any]]]):
    """Shuffles a stream in a buffer and cuts it into batches; every rank gets each n-th of them.

    The order depends on the seed and the epoch alone. A run that is resumed within an epoch reads over what it has
    already trained on.

    Args:
        stream: gives the features from the first on.
        batch_size: rows in a batch, on each rank.
        buffer: rows that are held, of which each next one is drawn.
        seed: fixes the order.
        trainer: the trainer whose progress counts, its epoch too; or None to begin every epoch at its beginning.
        problems: what the stream found wrong with rows.
    """

    def __init__(
        self,
        stream: Callable[[], Iterator[dict[str, Any]]],
        batch_size: int,
        buffer: int,
        seed: int,
        trainer: Any,
        problems: RowProblems,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.buffer = buffer
        self.seed = seed
        self.trainer = trainer
        self.problems = problems
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order, where no trainer tells the epoch.

        Args:
            epoch: the epoch that begins.
        """
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        done = 0
        if self.trainer is not None:  # which tells the epoch to samplers, and a stream has none
            self.epoch, done = progress_of(self.trainer)
        rank, count = ranks()
        for number, group in enumerate(self._groups(count)):
            if number >= done:
                yield group[rank::count]
        self._settle()

    def _settle(self) -> None:
        self.problems.settle("data (train, streamed)", 1)

    def _groups(self, count: int) -> Iterator[list[dict[str, Any]]]:
        """As many rows as all ranks take in one step; of several ranks none may wait for rows that are not there."""
        size, group = self.batch_size * count, []
        for feature in self._shuffled():
            group.append(feature)
            if len(group) == size:
                yield group
                group = []
        if group and count == 1:
            yield group

    def _shuffled(self) -> Iterator[dict[str, Any]]:
        shuffler = random.Random(f"{self.seed}-{self.epoch}")
        held: list[dict[str, Any]] = []
        for feature in self.stream():
            if self.problems.count and not self.problems.skip:
                self._settle()
            if len(held) < self.buffer:
                held.append(feature)
                continue
            place = shuffler.randrange(self.buffer)
            yield held[place]
            held[place] = feature
        shuffler.shuffle(held)
        yield from held
