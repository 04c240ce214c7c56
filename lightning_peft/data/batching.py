"""Batches of rows of similar length, in an order that a seed and an epoch fix, and that a run can rejoin."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Generator
from torch import distributed as dist
from torch.utils.data import DataLoader, Sampler

_POOL = 50
"""Batches that are sorted together: enough to make neighbours alike, few enough to leave the order random."""


class LengthGroupedBatches(Sampler[list[int]]):
    """Cuts a shuffled data set into batches of similar length; every rank gets its share.

    The order depends on the seed and the epoch alone, never on the global random state.

    Args:
        lengths: each row's length.
        batch_size: rows in a batch, on each rank.
        seed: fixes the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> LengthGroupedBatches:
        """Itself: Lightning tells the epoch to the batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order.

        Args:
            epoch: the epoch that begins.
        """
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        """All batches of this rank, in order; each rank has as many."""
        shuffler = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)
        size = self.batch_size * ranks()[1]
        pools = [order[i : i + size * _POOL] for i in range(0, len(order), size * _POOL)]
        ordered = [i for pool in pools for i in sorted(pool, key=lambda i: self.lengths[i], reverse=True)]
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        shuffler.shuffle(groups)
        rank, count = ranks()
        # the last group may be short: it is filled from its own beginning, so that no rank waits for another
        return [(g * count)[rank::count][: max(1, -(-len(g) // count))] if count > 1 else g for g in groups]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches()

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * ranks()[1]))


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def progress_of(trainer: Any) -> tuple[int, int]:
    """The epoch whose rows a trainer reads, and how many of its batches it has read.

    Args:
        trainer: the trainer, while it fits.
    """
    read, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    before = read.total.ready - read.current.ready
    # a run that max_steps ends within an epoch counts that one as over: what was read before tells better
    counted = isinstance(batches, int) and batches > 0 and before % batches == 0
    return before // batches if counted else trainer.current_epoch, read.current.ready


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that a Trainer can resume in the middle of an epoch.

    How many batches to leave out is read off the trainer's own progress when the first batch is asked for: Lightning
    makes iterators before it has restored its loops. Nothing is drawn from the global random state, so a resumed run
    does not drift from an uninterrupted one.

    Args:
        rows: the data set.
        batches: the batch sampler.
        trainer: the trainer whose progress counts, or None to begin every epoch at its beginning.
        **options: as DataLoader takes them.
    """

    def __init__(self, rows: Sequence[Any], batches: LengthGroupedBatches, trainer: Any = None, **options: Any) -> None:
        generator = Generator()
        generator.manual_seed(batches.seed)
        self._remaining = _Remaining(batches, trainer)
        super().__init__(rows, batch_sampler=self._remaining, generator=generator, **options)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        self._remaining.rejoin()  # before workers are started, which get a copy of the rows with the order's epoch
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Nothing: the trainer's progress is the state. Having it tells Lightning that the loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing is to be done; see `state_dict`."""


class _Remaining(Sampler[list[int]]):
    """The batches of an epoch that the trainer has not trained on yet."""

    def __init__(self, batches: LengthGroupedBatches, trainer: Any) -> None:
        self.sampler = batches
        self.trainer = trainer

    def rejoin(self) -> int:
        """Chooses the epoch that the trainer is in; gives how many of its batches are done."""
        if self.trainer is None:
            return 0
        epoch, done = progress_of(self.trainer)
        self.sampler.set_epoch(epoch)
        return done % max(1, len(self))

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.sampler.batches()[self.rejoin() :]

    def __len__(self) -> int:
        return len(self.sampler)
