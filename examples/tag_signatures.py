"""Tagging words: which of a Python signature's tokens are the function's name, a parameter, or a default?

python examples/tag_signatures.py --epochs 3
"""

import argparse
import ast
import io
import json
import tempfile
import tokenize
from pathlib import Path

import lightning as L

from lightning_peft import LoRA, PeftModule, TextDataModule, TokenClassification
from lightning_peft.data.docstrings import completion_examples

TAGS = ["O", "B-FUNCTION", "B-PARAMETER", "B-DEFAULT", "I-DEFAULT"]


def tagged(signature: str) -> dict[str, list[str]]:
    """The tokens of a signature, with the tags that Python's own parser gives them."""
    function = ast.parse(f"{signature.strip()} ...").body[0]
    arguments = function.args
    parameters = [(a.col_offset, a.col_offset + len(a.arg)) for a in ast.walk(arguments) if isinstance(a, ast.arg)]
    defaults = [(d.col_offset, d.end_col_offset) for d in (*arguments.defaults, *filter(None, arguments.kw_defaults))]
    spans = [("FUNCTION", 4, 4 + len(function.name))]
    spans += [("PARAMETER", *span) for span in parameters] + [("DEFAULT", *span) for span in defaults]
    words, tags = [], []
    for token in tokenize.generate_tokens(io.StringIO(signature.strip()).readline):
        if token.string.strip():
            column = token.start[1]
            inside = [(kind, start) for kind, start, end in spans if start <= column < end]
            words.append(token.string)
            tags.append(f"{'B' if inside[-1][1] == column else 'I'}-{inside[-1][0]}" if inside else "O")
    return {"tokens": words, "tags": tags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000, help="so many training examples")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp())
    for name, rows in zip(("train", "validation"), completion_examples(), strict=True):
        lines = [json.dumps(tagged(row["prompt"])) for row in rows[: options.limit] if row["prompt"].isascii()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))

    L.seed_everything(0, verbose=False)
    module = PeftModule("sentence-transformers/all-MiniLM-L6-v2", LoRA(r=8), TokenClassification(TAGS))
    data = TextDataModule(train_files=folder / "train.jsonl", validation_files=folder / "validation.jsonl")
    trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(module, data)
    print(f"F1 of entities {float(trainer.callback_metrics['val/f1']):.3f}")

    words, said = data.rows("validation")[0]["tokens"], trainer.predict(module, data)[0][0]
    for entity in said["entities"]:
        print(f"{entity['type']:10} {' '.join(words[entity['start'] : entity['end']])}")


if __name__ == "__main__":
    main()
