"""Embeddings on the embedded docstrings: a signature finds its docstring among all, before and after training.

python examples/signatures_find_docstrings.py --limit 256
"""

import argparse
import json
import tempfile
from pathlib import Path

import lightning as L

from lightning_peft import Embedding, LoRA, PeftModule, TextDataModule
from lightning_peft.data.docstrings import retrieval_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=256, help="only so many training pairs")
    parser.add_argument("--held-out", type=int, default=100, help="only so many pairs to search in")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    train, held_out = retrieval_examples()
    for name, rows in (("train", train[: options.limit]), ("held_out", held_out[: options.held_out])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    module = PeftModule("sentence-transformers/all-MiniLM-L6-v2", LoRA(r=8), Embedding())
    data = TextDataModule(train_files=folder / "train.jsonl", validation_files=folder / "held_out.jsonl", max_length=48)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    for name in ("recall_at_1", "recall_at_10", "mrr"):
        print(f"{name} {before[f'val/{name}']:.3f} -> {after[f'val/{name}']:.3f}")

    module.save_adapter(folder / "adapter")
    print(f'SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2").load_adapter("{folder / "adapter"}")')


if __name__ == "__main__":
    main()
