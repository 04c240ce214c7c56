"""Epochs after the first with the frozen layers' outputs read from a file, beside the same epochs without.

    python benchmarks/cached_layers.py

The embedded data, models of the embedded one's size with 6 and 24 layers, dropout 0, in turns in one process.
Training k of L layers takes 2 L + 4 k parts of arithmetic for each row, and 6 k with the frozen part at hand. The
figures go to ``benchmarks/results/cached_layers.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from typing_extensions import override

from lightning_peft import PeftModule, Selective, TextDataModule
from lightning_peft.callbacks.cache_frozen_layers import CacheFrozenLayers
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.base_source import EMBEDDED, resolve

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RUNS = {
    "head": (6, Selective(parameter_types=["head"], learning_rate=1e-2), None),
    "2 of 6 layers": (6, Selective(last_layers=2), 2),
    "2 of 24 layers": (24, Selective(last_layers=2), 2),
}


class Epochs(L.Callback):
    """Seconds of each epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds[-1] = time.perf_counter() - self.seconds[-1]


def base(layers: int) -> Any:
    """A classifier as large as the embedded model, of so many layers, with random weights."""
    options = {**QUIET, "num_hidden_layers": layers, "num_labels": 11}
    source, _ = resolve(EMBEDDED)
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, **options))


def epochs(layers: int, method: Any, rows: int, count: int, *, cached: bool) -> Epochs:
    """Trains, and gives what the epochs took."""
    L.seed_everything(0, verbose=False)
    module = PeftModule(base(layers), method)
    module.tokenizer = BaseModel().load_tokenizer()
    noted = Epochs()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [noted, *([CacheFrozenLayers(folder)] if cached else [])]
        options: dict[str, Any] = {**quiet, "limit_val_batches": 0, "num_sanity_val_steps": 0, "accelerator": "cpu"}
        trainer = L.Trainer(max_epochs=count, callbacks=callbacks, **options)
        trainer.fit(module, TextDataModule(limit=rows))
    return noted


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cached_layers.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    table: dict[str, Any] = {"rows": options.rows, "epochs": options.epochs}
    lines = []
    for name, (layers, method, k) in RUNS.items():
        ratios, apart = [], 0.0
        for _ in range(options.repeats):
            plain, cached = (epochs(layers, method, options.rows, options.epochs, cached=c) for c in (False, True))
            ratios.append(statistics.median(plain.seconds[1:]) / statistics.median(cached.seconds[1:]))
            apart = max(apart, *(abs(a - b) for a, b in zip(plain.losses, cached.losses, strict=True)))
        ratios.sort()
        gain = None if k is None else round((2 * layers + 4 * k) / (6 * k), 2)
        table[name] = {
            "times_as_fast": round(statistics.median(ratios), 2),
            "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
            "by_arithmetic": gain,
            "largest_difference_of_losses": apart,
        }
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        lines.append(f"{name:<16}{table[name]['times_as_fast']:>8}x{spread:>18}{gain or '':>10}{apart:>10.1e}")
    print(f"{'':<16}{'faster':>9}{'spread':>18}{'in theory':>10}{'losses':>10}")
    print("\n".join(lines))
    options.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
