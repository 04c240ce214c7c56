"""Accuracy on the embedded task with each method's defaults, and Hugging Face PEFT's on the same batches beside it.

    python benchmarks/embedded_accuracy.py lora hf_peft:lora --seeds 5
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
from typing import Any, cast

import lightning as L
import torch
from omegaconf import OmegaConf
from torch.nn import Module

from lightning_peft import PeftModule, TextClassification, TextDataModule
from lightning_peft.core.matching import output_heads
from lightning_peft.methods.config import method_from_config
from lightning_peft.tasks.base_model import BaseModel

EPOCHS = 3
CONF = Path(__file__).parents[1] / "conf" / "method"
METHODS = sorted(p.stem for p in CONF.glob("*.yaml"))


def method_named(name: str) -> Any:
    """The method of a YAML in ``conf/method``."""
    return method_from_config(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))))


def ours(name: str, seed: int, learning_rate: float | None) -> dict[str, Any]:
    """Trains with `PeftModule` and a Trainer; returns what was measured."""
    optimizer = None if learning_rate is None else {"lr": learning_rate}
    module = PeftModule(BaseModel().name_or_path, method_named(name), "text_classification", optimizer=optimizer)
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


def hf_peft(name: str, seed: int, learning_rate: float | None) -> dict[str, Any]:
    """The same method, options and budget with Hugging Face PEFT in a plain loop over the same batches."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
    from transformers import get_scheduler

    task, data, spec = TextClassification(), TextDataModule(seed=seed), BaseModel()
    data.connect(task, spec.load_tokenizer())
    data.setup("fit")
    base, method = spec.load(task), method_named(name)
    options = method.peft_config(base, list(method.place(base).layers))
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type](task_type="SEQ_CLS", **options)
    assert output_heads(base) == ["classifier"]  # which peft trains in full for this task, as we do
    model: Module = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate or method.learning_rate, weight_decay=0.0)
    loader = data.train_dataloader()
    steps = EPOCHS * len(loader)
    schedule = get_scheduler("linear", optimizer, math.ceil(0.06 * steps), steps)
    for epoch in range(EPOCHS):
        loader.batch_sampler.sampler.set_epoch(epoch)
        model.train()
        for batch in loader:
            total, count = task.loss(task.outputs(model, batch), batch)
            (total / count).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    metrics = task.metrics()
    with torch.no_grad():
        for batch in data.val_dataloader():
            task.update(metrics, task.outputs(model, batch), batch)
    return {"accuracy": float(metrics.compute()["accuracy"]), "trainable": sum(p.numel() for p in trained)}


def main() -> None:
    """Runs the named methods over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+", choices=[*METHODS, *(f"hf_peft:{m}" for m in METHODS)], metavar="method")
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
            run, method = (hf_peft, name.partition(":")[2]) if ":" in name else (ours, name)
            measured = run(method, seed, options.lr)
            row = {"method": name, "seed": seed, "lr": options.lr, **measured}
            row["seconds"] = round(time.perf_counter() - began, 1)
            print(json.dumps(row), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
