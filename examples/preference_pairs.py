"""DPO on pairs of docstrings: a function's own is preferred to another function's.

python examples/preference_pairs.py --limit 200 --epochs 1

The embedded model is an encoder made causal, too small to write well; --model takes any causal language model.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import lightning as L

from lightning_peft import DPO, LoRA, PeftModule, TextDataModule
from lightning_peft.data.docstrings import completion_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a folder or a hub name")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=200, help="only so many training pairs")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    counts = (options.limit, min(options.limit, 100))
    for name, examples, count in zip(("train", "held_out"), completion_examples(), counts, strict=True):
        some = random.sample(examples, count)
        rows = [
            {"prompt": own["prompt"], "chosen": own["completion"], "rejected": other["completion"]}
            for own, other in zip(some, some[1:] + some[:1], strict=True)
            if own["completion"] != other["completion"]
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    module = PeftModule(options.model, LoRA(r=8), DPO(beta=0.1), {"lr": 1e-3})
    data = TextDataModule(
        train_files=folder / "train.jsonl", validation_files=folder / "held_out.jsonl", batch_size=8, max_length=64
    )
    trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    for name in ("loss", "accuracy", "margin"):
        print(f"held-out {name} {float(trainer.callback_metrics[f'val/{name}']):.3f}")


if __name__ == "__main__":
    main()
