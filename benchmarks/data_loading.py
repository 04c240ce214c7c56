"""How long training waits for its data, and how fast rows become token ids, on the embedded model and data.

    python benchmarks/data_loading.py

One minute on two cores. The figures go to ``benchmarks/results/data_loading.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler
from typing_extensions import override

from lightning_peft import CausalLM, LoRA, PeftModule, TextClassification, TextDataModule
from lightning_peft.data.docstrings import examples_with
from lightning_peft.data.encoding import Encoder
from lightning_peft.data.files import Example
from lightning_peft.data.problems import RowProblems
from lightning_peft.tasks.base_model import BaseModel


class Tokens(L.Callback):
    """Counts the tokens that are trained on, and times the steps after the first, in which everything warms up."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self.began = self.ended = 0.0

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended = time.perf_counter()
        if not self.began:
            self.began = self.ended
            return
        self.steps += 1
        self.tokens += int(batch["attention_mask"].sum())


def waiting(steps: int, threads: int) -> dict[str, Any]:
    """The demo's training with LoRA: how much of it is spent on getting batches, as Lightning's profiler has it."""
    torch.set_num_threads(threads)
    L.seed_everything(0, verbose=False)
    counted, profiler = Tokens(), SimpleProfiler()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"max_steps": steps + 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": "cpu", **quiet}
    trainer = L.Trainer(callbacks=[counted], profiler=profiler, **options)
    trainer.fit(PeftModule({}, LoRA()), TextDataModule())
    waits = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    waited, whole = sum(waits[1:]), counted.ended - counted.began  # the first wait makes the loader
    return {
        "steps": counted.steps,
        "step_ms": 1000 * whole / counted.steps,
        "waiting_ms": 1000 * waited / counted.steps,
        "waiting_share": waited / whole,
        "first_wait_ms": 1000 * waits[0],
        "tokens_per_second": counted.tokens / whole,
    }


def tokenizing(num_proc: int, copies: int) -> dict[str, Any]:
    """Tokens a second from rows to features, over all and after the first row, for which processes have to start."""
    tokenizer = BaseModel().load_tokenizer()
    rows, _ = examples_with("text")
    examples = [Example(row, str(i)) for i, row in enumerate(rows * copies)]
    encoder = Encoder(CausalLM(), tokenizer, 512, training=True)
    began = time.perf_counter()
    stream = encoder.stream(examples, RowProblems(skip=False), num_proc)
    tokens = len(next(stream)["input_ids"])
    first = time.perf_counter()
    tokens += sum(len(f["input_ids"]) for f in stream)
    ended = time.perf_counter()
    return {
        "num_proc": num_proc,
        "rows": len(examples),
        "first_row_seconds": first - began,
        "tokens_per_second": tokens / (ended - began),
        "tokens_per_second_after": tokens / (ended - first),
    }


def reading_kept() -> dict[str, float]:
    """Seconds of a data set-up that tokenizes, and of one that finds the token ids on disk."""
    tokenizer = BaseModel().load_tokenizer()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first_seconds", "again_seconds"):
            data = TextDataModule(cache_dir=folder)
            data.connect(TextClassification(), tokenizer)
            began = time.perf_counter()
            data.setup("fit")
            found[name] = time.perf_counter() - began
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--copies", type=int, default=5, help="of the docstrings, to tokenize")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_loading.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = {
        "torch": torch.__version__,
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "training": waiting(options.steps, options.threads),
        "tokenizing": [tokenizing(n, options.copies) for n in (1, 2)],
        "data_setup": reading_kept(),
    }
    written = json.dumps(found, indent=2)
    options.output.write_text(f"{written}\n")
    print(written)


if __name__ == "__main__":
    main()
