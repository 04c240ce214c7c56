"""How far full fine-tuning and LoRA take the embedded model from itself, by the callback `Forgetting`.

    OMP_NUM_THREADS=1 python benchmarks/forgetting.py

Each method at its own learning rate, on the embedded tasks, with several seeds; the base is compared on docstrings of
the standard library's modules, of which nothing is trained on. The embedded model cannot write, so it has no language
modelling that could be forgotten. In the third setting it is taught some first, on other such docstrings, and then
trained on something else: to write the signature to a docstring, which is code. The figures go to
``benchmarks/results/forgetting.json`` and into the table of ``docs/guide/forgetting.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_peft import LoRA, PeftModule, Selective, TextDataModule
from lightning_peft.callbacks.forgetting import Forgetting
from lightning_peft.data.docstrings import completion_examples, module_texts
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "forgetting.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
HELD_OUT = 64  # texts to compare on; those behind them teach
METHODS = {"full": lambda: Selective(keep_originals=False), "lora": lambda: LoRA()}
QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False),
    **{"accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0},
}


def trained(model: str, method: Any, task: str, data: TextDataModule, steps: int, seed: int) -> dict[str, Any]:
    """Trains, and gives what the callback says of it."""
    L.seed_everything(seed, verbose=False)
    callback = Forgetting(rows=HELD_OUT)
    trainer = L.Trainer(max_steps=steps, callbacks=[callback], **QUIET)
    trainer.fit(PeftModule(model, method, task), data)
    assert callback.result is not None
    return callback.result


def taught(folder: Path, steps: int) -> str:
    """The embedded model, made causal and trained in full to continue docstrings of modules."""
    base = BaseModel()
    tokenizer: Any = base.load_tokenizer()
    L.seed_everything(0, verbose=False)
    model: Any = base.load(task_from_config("sft"), None)
    ids = [i for t in islice(module_texts(), HELD_OUT, None) for i in tokenizer(t, verbose=False)["input_ids"]]
    blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    model.train()
    for step in range(steps):
        some = blocks[torch.arange(step * 8, step * 8 + 8) % len(blocks)]
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def signatures(folder: Path) -> str:
    """The embedded pairs the other way round: a docstring, and the signature to write to it."""
    path = folder / "signatures.jsonl"
    rows = ({"prompt": r["completion"] + "\n", "completion": r["prompt"].strip()} for r in completion_examples()[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs with several seeds have in common, and how far they are apart."""
    return {
        "kind": runs[0]["kind"],
        "before": statistics.mean(run["before"] for run in runs),
        "forgetting": [run["forgetting"] for run in runs],
        "drift": [statistics.mean(run["layers"].values()) for run in runs],
        "layers": {name: statistics.mean(run["layers"][name] for run in runs) for name in runs[0]["layers"]},
    }


def table(found: dict[str, Any]) -> str:
    """The figures as a table of the docs: mean and spread over the seeds."""
    lines = ["| trained on | base | method | forgetting | drift, mean of the layers |", "|---|---|---|---|---|"]
    for setting, methods in found["settings"].items():
        for method, figures in methods.items():
            in_nats = figures["kind"] == "loss"
            base = f"loss {figures['before']:.2f}" if in_nats else "CKA 1"
            forgot = _spread(figures["forgetting"]) + (" nats a token" if in_nats else "")
            lines.append(f"| {setting} | {base} | `{method}` | {forgot} | {_spread(figures['drift'])} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def page(text: str, found: dict[str, Any]) -> str:
    """The docs' page with the figures in it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--taught", type=int, default=40, help="steps in which the third base is taught to write")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "forgetting.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    found: dict[str, Any] = {"steps": options.steps, "taught": options.taught, "rows": HELD_OUT, "settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        writer, embedded = taught(Path(folder), options.taught), BaseModel().name_or_path
        reverse = {"train_files": signatures(Path(folder))}
        for setting, model, task, source in (
            ("text_classification", embedded, "text_classification", {"max_length": 64}),
            ("sft", embedded, "sft", {"max_length": 96}),
            ("sft of signatures, once taught", writer, "sft", {"max_length": 96, **reverse}),
        ):
            found["settings"][setting] = {}
            for method, make in METHODS.items():
                runs = []
                for seed in range(options.seeds):
                    data = TextDataModule(**source, batch_size=16, limit=32 * options.steps, seed=seed)
                    runs.append(trained(model, make(), task, data, options.steps, seed))
                found["settings"][setting][method] = measured(runs)
    print(table(found))
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.output == parser.get_default("output"):
        PAGE.write_text(page(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
