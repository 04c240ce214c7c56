"""Train a language model's adapter, reload it from its checkpoint, and write with it.

The base is a tiny Llama with random weights, made on the spot: what it writes is nonsense, but every step is the one
for a real model. Give a folder or a hub name to see sense:

    python examples/reload_and_generate.py --model /path/to/a/causal/language/model
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
import torch

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.tasks.base_model import BaseModel


def tiny_llama(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = BaseModel().load_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=128, help="only so many training examples")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    model = options.model or tiny_llama(folder / "base")
    module = PeftModule(model, LoRA(r=8), "sft")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, limit_val_batches=4)
    trainer.fit(module, TextDataModule("docstrings", limit=options.limit))

    again = PeftModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True).eval()
    prompt = again.tokenizer("def close(self):", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        written = again.model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    print(again.tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
