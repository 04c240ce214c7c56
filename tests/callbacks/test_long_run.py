"""A run that saves often holds at its end what it held near its beginning; `benchmarks/long_run.py` is the long one."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks import ways

way = ways.way
FILES = Path("/proc/self/fd")


class Held(L.Callback):
    """What the process holds after some steps, by kind."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.seen: list[Counter[str]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            gc.collect()
            things = gc.get_objects()
            held = Counter(type(thing).__name__ for thing in things)
            held["open files"] = len(os.listdir(FILES)) if FILES.is_dir() else 0
            tensors = [thing for thing in things if type(thing) in (torch.Tensor, torch.nn.Parameter)]
            held["numbers in tensors"] = sum(tensor.numel() for tensor in tensors)
            del held["list"]  # the points of the curve of losses, which have a bound of their own
            self.seen.append(held)


def test_what_a_run_holds_does_not_grow_with_its_steps_and_checkpoints(way, trainer, tmp_path):
    held, keep = Held(20, 80, 140), ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=10)
    options = {"max_steps": 140, "max_epochs": 24, "enable_checkpointing": True, "limit_val_batches": 0}
    trainer(*way.callbacks(), keep, held, **options).fit(way.make(), way.data())
    early, middle, late = held.seen
    # what is left behind grows all the time, a cache of Python's or torch's once
    grown = {kind: min(middle[kind] - early[kind], late[kind] - middle[kind]) for kind in late}
    assert grown["open files"] == 0
    assert {kind: more for kind, more in grown.items() if more > 54} == {}  # of 60 steps none leaves a thing behind
    assert len(list((tmp_path / "kept").iterdir())) == 2
