"""Reference values from TRL's SFTTrainer, which wants another transformers than this library.

It runs in an environment of its own and imports nothing of lightning_peft::

    python3 -m venv trl_env
    trl_env/bin/pip install torch==2.13.0 trl==1.16.0 jinja2
    trl_env/bin/python tests/parity/make_trl_reference.py

``trl_reference/`` gets a tiny model, its tokenizer, and in ``reference.json`` for each case the options, the rows, what
TRL makes of them (token ids and labels, batch after batch) and the losses of some steps of SGD that train everything.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

FOLDER = Path(__file__).parent / "trl_reference"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LEARNING_RATE, BATCH_SIZE, EPOCHS = 0.5, 2, 2

WORDS = "the weather in a city is sunny or cloudy; user, assistant and system say hello, yes and no to each other."
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather.", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


CONVERSATIONS = [
    say("hello", "hello to you"),
    say("one", "first answer", "two", "second, longer answer", system="Be brief."),
    say("Grüß Gott 🦊", "  ça va?  ", "  \nmore ", "你好"),
    say("sunny?", "yes", "and the other city?", "no", "or cloudy?", "yes and no"),
]
THINKING = [
    say("hello", "<think>\nthe user says hello\n</think>\n\nhello"),
    say("one", "<think>\nfirst\n</think>\n\nfirst answer", "two", "<think>\nsecond\n</think>\n\nsecond answer"),
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    say("the city?", "Bern"),
]
PAIRS = [
    {"prompt": "the weather is", "completion": " sunny"},
    {"prompt": "user, say", "completion": " hello to the other user"},
    {"prompt": "é 🦊:\n", "completion": "你好"},
    {"prompt": "a city in the", "completion": " city"},
]
# ChatML with marks set by hand: the assistant's text and the token that ends its turn, not the line's end behind it
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "messages": (CHATML, [{"messages": m} for m in CONVERSATIONS], {"assistant_only_loss": True}),
    "thinking_and_tools": (
        (TEMPLATES / "qwen3_training.jinja").read_text(),
        [{"messages": m, "tools": json.dumps([TOOL] if m[-2]["role"] == "tool" else [])} for m in THINKING],
        {"assistant_only_loss": True},
    ),
    "cut": (CHATML, [{"messages": m} for m in CONVERSATIONS], {"assistant_only_loss": True, "max_length": 40}),
    "prompt_and_completion": (CHATML, PAIRS, {"completion_only_loss": True}),
    "messages_as_prompt_and_completion": (
        CHATML,
        [{"prompt": m[:-1], "completion": m[-1:]} for m in CONVERSATIONS],
        {"completion_only_loss": True},
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a few merges, and the tokens of the templates."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")


class InOrder(trl.SFTTrainer):
    """SFTTrainer that takes the rows in their order and keeps what it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.losses: list[float] = []

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.batches.append({k: inputs[k].tolist() for k in ("input_ids", "labels")})
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def main() -> None:
    """Makes the folder."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**SIZES, **special, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    FOLDER.mkdir(exist_ok=True)
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    found: dict[str, Any] = {"versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)}, "cases": {}}
    for name, (template, rows, options) in CASES.items():
        tokenizer.chat_template = template
        arguments = trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            loss_type="nll",
            packing=False,
            **options,
        )
        trainer = InOrder(
            model=Qwen2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        found["cases"][name] = {
            "template": template,
            "rows": rows,
            "options": options,
            "batches": trainer.batches,
            "losses": trainer.losses,
        }
        print(name, [round(loss, 5) for loss in trainer.losses])
    found["sgd"] = {"learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "epochs": EPOCHS}
    (FOLDER / "reference.json").write_text(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
