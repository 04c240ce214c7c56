"""How the embedded task's accuracy depends on the learning rate, around each method's default.

    python benchmarks/learning_rates.py lora dora ia3    # or no names: all methods of the README's table
    python benchmarks/learning_rates.py --seeds 2

A run is shorter than those of the README's table: 100 steps of 16 rows of at most 16 tokens. One line of JSON
a finished run goes to ``benchmarks/results/learning_rates.jsonl``; runs that stand there are not made again, so the
same command goes on where it was stopped. `learning_rate_table.py` makes the table in ``docs/guide/learning_rate.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from omegaconf import OmegaConf

from lightning_peft import PeftModule, TextDataModule
from lightning_peft.core.problems import nearest
from lightning_peft.methods.config import method_from_config
from lightning_peft.tasks.base_model import BaseModel

CONF = Path(__file__).parents[1] / "conf" / "method"
RESULTS = Path(__file__).parent / "results" / "learning_rates.jsonl"
FACTORS = ((1.0, 0.32, 3.2), (0.1, 10.0))
"""Half-decades around the default; those near it come first for all methods: a sweep that was stopped has them."""

# the README's table, those that most people use first
METHODS = (
    *("lora", "ia3", "bitfit", "houlsby", "dora", "prompt_tuning", "full", "pfeiffer", "head", "prefix_tuning"),
    *("vera", "oft", "adalora", "p_tuning", "norm", "last_layers", "loha", "lokr", "miss", "boft", "lora_fa", "pissa"),
    *("eva", "randlora", "shira", "fish_mask", "parallel", "madx", "compacter", "embeddings", "ladder_side_tuning"),
    *("deep_prompt", "prefix_tuning_mlp", "loreft", "gradual_unfreezing"),
)


def finished(file: Path) -> set[tuple[str, float, int]]:
    """Method, factor and seed of the runs that a file holds."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {(row["method"], row["factor"], row["seed"]) for row in map(json.loads, lines)}


def method_named(name: str) -> Any:
    """The method of a YAML in ``conf/method``."""
    return method_from_config(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))))


def run(name: str, factor: float, seed: int, steps: int) -> dict[str, Any]:
    """Trains once; returns what was measured, None for what is no number."""
    began = time.perf_counter()
    L.seed_everything(seed, verbose=False)
    method = method_named(name)
    rate = float(f"{factor * method.learning_rate:.3g}")
    module = PeftModule(BaseModel().name_or_path, method, "text_classification", optimizer={"lr": rate})
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, TextDataModule(seed=seed, batch_size=16, max_length=16))
    found = {key: float(trainer.callback_metrics[f"val/{key}"]) for key in ("accuracy", "loss")}
    return {
        "method": name,
        "factor": factor,
        "seed": seed,
        "lr": rate,
        "default": method.learning_rate,
        "steps": trainer.global_step,
        **{key: round(value, 5) if math.isfinite(value) else None for key, value in found.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def sweep(methods: Sequence[str], seeds: int, steps: int, output: Path) -> None:
    """Makes the runs that are missing in ``output``, a seed after the other."""
    done = finished(output)
    todo = [(name, f, seed) for seed in range(seeds) for factors in FACTORS for name in methods for f in factors]
    missing = [one for one in todo if one not in done]
    print(f"{len(missing)} of {len(todo)} runs to make", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, factor, seed in missing:
        line = json.dumps(run(name, factor, seed, steps))
        print(line, flush=True)
        with output.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    """Sweeps over the named methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="method", help="by their names in conf/method; none: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="of a run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.methods:
        if name not in METHODS:
            parser.error(f"method {name!r} is unknown{nearest(name, METHODS)}")
    warnings.filterwarnings("ignore")
    sweep(options.methods or METHODS, options.seeds, options.steps, options.output)


if __name__ == "__main__":
    main()
