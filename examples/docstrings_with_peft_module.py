"""PeftModule on the embedded docstrings: which package does a docstring come from?

python examples/docstrings_with_peft_module.py --epochs 3
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L

from lightning_peft import LoRA, PeftModule, TextDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="only so many training examples")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    module = PeftModule("sentence-transformers/all-MiniLM-L6-v2", LoRA(r=8), "text_classification")
    data = TextDataModule("docstrings", limit=options.limit)
    folder = Path(tempfile.mkdtemp())
    trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(module, data)
    print(f"accuracy {float(trainer.callback_metrics['val/accuracy']):.3f}")

    module.save_adapter(folder / "adapter")
    again = PeftModule.from_adapter(folder / "adapter")
    said = trainer.predict(again, data)[0][0]
    print(f"from the exported folder: {said}")


if __name__ == "__main__":
    main()
