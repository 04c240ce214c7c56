"""Reference values of direct preference optimization, from TRL.

It runs in an environment of its own and imports nothing of lightning_peft::

    python3 -m venv trl_env
    trl_env/bin/pip install torch==2.13.0
    trl_env/bin/pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 safetensors
    trl_env/bin/python tests/parity/make_dpo_reference.py

``dpo_reference.safetensors`` has each base's tensors (``<base>/base/``) and, for each case, LoRA's as they start
(``<case>/start/``), and the loss, the accuracy and the rewards of each of six steps of AdamW (``<case>/loss`` and so
on). Its metadata has the versions, the bases' configurations, the tokenizer's words, the pairs and the cases' options.
"""

from __future__ import annotations

import json
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from trl import DPOConfig, DPOTrainer

PATH = Path(__file__).parent / "dpo_reference.safetensors"
RATE, EPOCHS = 1e-2, 1
WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "what",
    "is",
    "it",
    "a",
    "an",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "no",
    "yes",
]
WORDS += ["nothing", "here", "there"]
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "vocab_size": len(WORDS)}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 32, **SPECIAL},
    ),
    # with dropout, which TRL takes out
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL}),
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"base": "llama", "lora": LORA, "trl": {"beta": 0.1}},
    "sigmoid_beta": {"base": "llama", "lora": LORA, "trl": {"beta": 2.0}},
    "ipo": {"base": "llama", "lora": LORA, "trl": {"loss_type": "ipo", "beta": 0.3}},
    "hinge": {"base": "llama", "lora": LORA, "trl": {"loss_type": "hinge", "beta": 1.0}},
    # of one pair a batch this is the smoothed sigmoid, which TRL has under no name of its own
    "smoothed": {"base": "llama", "lora": LORA, "trl": {"loss_type": "aot", "label_smoothing": 0.2}, "batch": 1},
    "saved_copies": {"base": "llama", "lora": LORA | {"modules_to_save": ["lm_head"]}, "trl": {"beta": 1.0}},
    "dropout": {"base": "gpt2", "lora": LORA, "trl": {"beta": 0.5}},
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word is a token."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def pairs(count: int) -> list[dict[str, str]]:
    """Texts of different lengths; TRL puts the end behind an answer, one word apart from it here."""
    shuffler = random.Random(0)

    def text(most: int) -> str:
        return " ".join(shuffler.choices(WORDS[3:], k=shuffler.randint(1, most)))

    return [{"prompt": text(5), "chosen": f" {text(6)} ", "rejected": f" {text(4)} "} for _ in range(count)]


class InOrder(DPOTrainer):
    """Takes the pairs as they come, and keeps each step's values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.values: dict[str, list[float]] = {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        found = self._metrics["train"]
        self.values.setdefault("loss", []).append(loss.item())
        for ours, theirs in (
            ("accuracy", "rewards/accuracies"),
            ("margin", "rewards/margins"),
            ("reward_chosen", "rewards/chosen"),
            ("reward_rejected", "rewards/rejected"),
        ):
            self.values.setdefault(ours, []).append(found[theirs][-1])
        return loss


def run(case: dict[str, Any], base: transformers.PreTrainedModel, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Trains LoRA from a start that already differs from the base."""
    options = DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=case.get("batch", 4),
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        **case["trl"],
    )
    rows = rows[: 6 * case.get("batch", 4)]
    trainer = InOrder(
        base,
        args=options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **case["lora"]),
    )
    # moved only now: the reference of an adapter that is given with the model is that adapter's start
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    start = {k: v.clone() for k, v in peft.get_peft_model_state_dict(trainer.model).items()}
    trainer.train()
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in trainer.values.items()}
    return {**{f"start/{k}": v for k, v in start.items()}, **found}


def main() -> None:
    rows = pairs(24)
    tensors: dict[str, Tensor] = {}
    for name, (kind, sizes) in BASES.items():
        torch.manual_seed(0)
        base = getattr(transformers, kind)._from_config(getattr(transformers, kind).config_class(**sizes))
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        tensors |= {f"{name}/base/{k}": v.clone().contiguous() for k, v in base.state_dict().items()}
    for name, case in CASES.items():
        kind, sizes = BASES[case["base"]]
        base = getattr(transformers, kind)._from_config(getattr(transformers, kind).config_class(**sizes))
        prefix = f"{case['base']}/base/"
        base.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        tensors |= {f"{name}/{k}": v.contiguous() for k, v in run(case, base, rows).items()}
    packages = ("trl", "peft", "transformers", "torch")
    metadata = {
        "versions": {p: version(p) for p in packages},
        "bases": BASES,
        "cases": CASES,
        "words": WORDS,
        "pairs": rows,
        "rate": RATE,
        "epochs": EPOCHS,
    }
    save_file(tensors, PATH, {k: json.dumps(v) for k, v in metadata.items()})


if __name__ == "__main__":
    main()
