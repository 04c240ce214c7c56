"""Fine-tune on conversations: only what the assistant says is learnt, and the adapter carries the chat template.

The base is a tiny Llama with random weights and no chat template, made on the spot: the form of its answers is learnt,
their sense is not. Give a folder or a hub name to see sense:

    python examples/chat.py --model /path/to/a/causal/language/model
"""

import argparse
import json
import tempfile
from pathlib import Path

import lightning as L

from lightning_peft import LoRA, PeftModule, SupervisedFineTuning, TextDataModule
from lightning_peft.tasks.base_model import BaseModel

CONVERSATION = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What colour is grass?"},
    {"role": "assistant", "content": "green"},
    {"role": "user", "content": "And the sky?"},
    {"role": "assistant", "content": "blue"},
]


def tiny_llama(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = BaseModel().load_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    chats = folder / "chats.jsonl"
    chats.write_text((json.dumps({"messages": CONVERSATION}) + "\n") * 64)
    (folder / "question.jsonl").write_text(json.dumps({"messages": CONVERSATION[:-1]}) + "\n")

    module = PeftModule(
        options.model or tiny_llama(folder / "base"),
        LoRA(r=8, modules_to_save=["lm_head"]),
        SupervisedFineTuning(chat_template="zephyr"),
        {"lr": 5e-3},
        generation={"max_new_tokens": 8},
    )
    data = TextDataModule(
        train_files=str(chats),
        validation_files=str(chats),
        predict_files=str(folder / "question.jsonl"),
        batch_size=8,
        max_length=128,
    )
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    L.Trainer(max_epochs=options.epochs, **quiet).fit(module, data)

    again = PeftModule.from_adapter(module.save_adapter(folder / "adapter"))
    (answers,) = L.Trainer(**quiet).predict(again, data)
    print("the adapter's folder:", sorted(p.name for p in (folder / "adapter").iterdir()))
    print("And the sky?", answers[0]["completion"])


if __name__ == "__main__":
    main()
