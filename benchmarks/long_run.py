"""Whether a long run stays as it began: memory, open files, objects and the time of a step, and swapped adapters.

    python benchmarks/long_run.py

The first part trains a tiny model for 20,000 steps and saves a checkpoint every 50. The second loads 1,000 adapters
onto one base, one after the other, with the latest 64 in use in one batch, and compares every output with a plain
product of matrices. The figures go to ``benchmarks/results/long_run.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import Adapter, LoRA, PeftCallback, adapt, adapter_names, load_adapter

WIDTH, RANK, EVERY = 64, 4, 50


def state() -> dict[str, int]:
    """What the process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
    }


class Small(L.LightningModule):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """A mean square."""
        loss = self.backbone(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def backbone() -> nn.Sequential:
    """The base of both parts, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def yardstick() -> float:
    """The processor's seconds for a piece of work that never changes: what a step's time is measured by.

    A shared machine's processor is half as fast for minutes at a time, which says nothing about the run.
    """
    began = time.process_time()
    total, square = 0, torch.ones(WIDTH, WIDTH)
    for number in range(5000):
        total += number
    for _ in range(100):
        square = (square @ square).clamp(max=1)
    return time.process_time() - began


class Watch(L.Callback):
    """Notes the state and the processor's time for a step at even distances; other processes do not count in it."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.yards: list[float] = []
        self.last = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each step; those that save are among them."""
        if self.last:
            self.times.append(time.process_time() - self.last)
        if trainer.global_step % min(10, self.every) == 0:
            self.yards.append(yardstick())
        if trainer.global_step % self.every == 0:
            took, yard = statistics.median(self.times), statistics.median(self.yards)
            step = {"step": trainer.global_step, "step_cpu_ms": 1000 * took, "step_in_yardsticks": took / yard}
            self.seen.append({**step, **state()})
            self.times, self.yards = [], []
        self.last = time.process_time()


def train(steps: int, points: int, folder: Path) -> list[dict[str, Any]]:
    """Trains and watches."""
    data = DataLoader(TensorDataset(torch.randn(8 * 500, WIDTH)), batch_size=8, shuffle=True)
    watch, keep = Watch(steps // points), ModelCheckpoint(folder, save_last=True, every_n_train_steps=EVERY)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PeftCallback(LoRA(r=RANK), "backbone", print_plan=False), keep, watch],
    )
    trainer.fit(Small(), data)
    return watch.seen


def written(count: int, folder: Path) -> list[Path]:
    """Folders of that many adapters, each with numbers of its own."""
    adapter = adapt(backbone(), LoRA(r=RANK))
    adapter.save(folder / "0")
    shapes = {n: t.shape for n, t in load_file(folder / "0" / "adapter_model.safetensors").items()}
    for number in range(count):
        here = folder / str(number)
        here.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "lightning_peft.json"):
            if (folder / "0" / name).exists() and number:
                (here / name).write_bytes((folder / "0" / name).read_bytes())
        draw = torch.Generator().manual_seed(number)
        tensors = {n: 0.1 * torch.randn(s, generator=draw) for n, s in shapes.items()}
        save_file(tensors, here / "adapter_model.safetensors", metadata={"format": "pt"})
    return [folder / str(number) for number in range(count)]


def expected(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What the base gives with an adapter's file, by plain products."""
    stored, model, strength = load_file(path / "adapter_model.safetensors"), backbone(), LoRA(r=RANK).lora_alpha / RANK
    for place in (0, 2):
        a, b = (next(t for n, t in stored.items() if f".{place}.lora_{m}." in n) for m in "AB")
        model[place].weight.data += strength * b @ a
    return model(x)


@torch.no_grad()
def swap(paths: list[Path], in_use: int, points: int) -> tuple[list[dict[str, Any]], float]:
    """Loads all, with the latest in use together; gives what was seen and the largest difference of an output."""
    model, held, worst = backbone(), [], 0.0
    x = torch.randn(in_use, WIDTH, generator=torch.Generator().manual_seed(1))
    right: dict[str, torch.Tensor] = {}
    seen, every = [], max(len(paths) // points, 1)
    for number, path in enumerate(paths, start=1):
        if len(held) == in_use:
            old = held.pop(0)
            Adapter(model, old).remove()
            del right[old]
        name = f"adapter-{number}"
        load_adapter(model, path, name)
        held.append(name)
        right[name] = expected(path, x)
        with adapter_names(model, held):
            found = model(x[: len(held)])
        wanted = torch.stack([right[n][row] for row, n in enumerate(held)])
        worst = max(worst, float((found - wanted).abs().max()))
        if number % every == 0:
            seen.append({"adapters": number, **state()})
    return seen, worst


def growth(seen: list[dict[str, Any]], key: str, warm: int) -> float:
    """The last quarter's median over that of the first quarter after the warm-up, minus 1."""
    values = [point[key] for point in seen[warm:]]
    some = max(len(values) // 4, 1)
    return statistics.median(values[-some:]) / statistics.median(values[:some]) - 1


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--adapters", type=int, default=1_000)
    parser.add_argument("--in-use", type=int, default=64)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "long_run.json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(options.steps, options.points, Path(folder) / "checkpoints")
        paths = written(options.adapters, Path(folder) / "adapters")
        swapped, worst = swap(paths, options.in_use, options.points)
    full = next(i for i, point in enumerate(swapped) if point["adapters"] >= options.in_use)
    warm = len(trained) // 10
    found = {
        "command": "python benchmarks/long_run.py",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "training": {
            "steps": options.steps,
            "checkpoints": options.steps // EVERY,
            "growth": {k: growth(trained, k, warm) for k in trained[0] if k != "step"},
            "seen": trained,
        },
        "swapping": {
            "adapters": options.adapters,
            "in_use": options.in_use,
            "largest_difference": worst,
            "growth": {k: growth(swapped, k, full + 1) for k in ("memory_bytes", "open_files", "objects")},
            "seen": swapped,
        },
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for part in ("training", "swapping"):
        print(part, {k: f"{v:+.2%}" for k, v in found[part]["growth"].items()})
    print(f"largest difference of an output: {worst:.1e}")


if __name__ == "__main__":
    main()
