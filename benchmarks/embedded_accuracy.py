"""Accuracy on the embedded task: this package's LoRA beside Hugging Face PEFT's, and every method's defaults.

    python benchmarks/embedded_accuracy.py lora hf_peft --seeds 5
    python benchmarks/embedded_accuracy.py full head last_layers bitfit norm embeddings houlsby pfeiffer prompt_tuning

One line of JSON a run goes to ``benchmarks/results/embedded_accuracy.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import Module

from lightning_peft import (
    BottleneckAdapter,
    LoRA,
    PeftModule,
    PromptTuning,
    Selective,
    TextClassification,
    TextDataModule,
)
from lightning_peft.tasks.base_model import BaseModel

EPOCHS = 3
METHODS: dict[str, Any] = {
    "lora": lambda: LoRA(),
    "full": lambda: Selective(keep_originals=False, learning_rate=2e-4),
    "head": lambda: Selective(parameter_types=["head"], learning_rate=2e-2),
    "last_layers": lambda: Selective(last_layers=2, learning_rate=5e-4),
    "bitfit": lambda: Selective(parameter_types=["bias"], learning_rate=5e-3),
    "norm": lambda: Selective(parameter_types=["norm"], learning_rate=5e-3),
    "embeddings": lambda: Selective(parameter_types=["embedding"], learning_rate=2e-3),
    "houlsby": lambda: BottleneckAdapter(),
    "pfeiffer": lambda: BottleneckAdapter(mh_adapter=False),
    "parallel": lambda: BottleneckAdapter(mh_adapter=False, is_parallel=True, scaling=4.0),
    "prompt_tuning": lambda: PromptTuning(),
}


def ours(name: str, seed: int, learning_rate: float | None) -> dict[str, Any]:
    """Trains with `PeftModule` and a Trainer; returns what was measured."""
    optimizer = None if learning_rate is None else {"lr": learning_rate}
    module = PeftModule(BaseModel().name_or_path, METHODS[name](), "text_classification", optimizer=optimizer)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=Path("outputs") / "embedded_accuracy" / f"{name}-{seed}",
    )
    trainer.fit(module, TextDataModule(seed=seed))
    path = Path(trainer.checkpoint_callback.best_model_path)
    return {
        "accuracy": float(trainer.callback_metrics["val/accuracy"]),
        "trainable": module.adapter.plan.trainable,
        "checkpoint_bytes": path.stat().st_size,
    }


def hf_peft(seed: int) -> dict[str, Any]:
    """The same budget with Hugging Face PEFT in a plain loop over the same batches."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    task, data, spec = TextClassification(), TextDataModule(seed=seed), BaseModel()
    data.connect(task, spec.load_tokenizer())
    data.setup("fit")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    model: Module = get_peft_model(spec.load(task), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    loader = data.train_dataloader()
    steps = EPOCHS * len(loader)
    schedule = get_scheduler("linear", optimizer, math.ceil(0.06 * steps), steps)
    for epoch in range(EPOCHS):
        loader.batch_sampler.sampler.set_epoch(epoch)
        model.train()
        for batch in loader:
            total, count = task.loss(model(**task.inputs(batch)), batch)
            (total / count).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    metrics = task.metrics()
    with torch.no_grad():
        for batch in data.val_dataloader():
            task.update(metrics, model(**task.inputs(batch)), batch)
    return {"accuracy": float(metrics.compute()["accuracy"]), "trainable": sum(p.numel() for p in trained)}


def main() -> None:
    """Runs the named methods over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+", choices=[*METHODS, "hf_peft"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = Path(__file__).parent / "results" / "embedded_accuracy.jsonl"
    results.parent.mkdir(exist_ok=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.methods:
            L.seed_everything(seed, verbose=False)
            began = time.perf_counter()
            measured = hf_peft(seed) if name == "hf_peft" else ours(name, seed, options.lr)
            row = {"method": name, "seed": seed, "lr": options.lr, **measured}
            row["seconds"] = round(time.perf_counter() - began, 1)
            print(json.dumps(row), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
