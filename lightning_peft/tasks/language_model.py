"""What tasks that predict the next token have in common: the loss, its other units, and writing."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_peft.tasks.counted import Counted, counted
from lightning_peft.tasks.padding import pad_token


class NextToken:
    """Cross-entropy of the tokens that count, each predicted from those before it.

    Attributes:
        all_logits: whether logits are computed for all tokens, not for those alone that count.
        packing: whether rows of a batch may be packed.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    all_logits: bool
    packing: bool

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: a language model's head has the vocabulary's size."""
        return {}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Nothing: the task knows all that it needs."""

    def outputs(self, model: Any, batch: dict[str, Any]) -> Counted:
        """What the model says about the tokens that count; the loss is taken outside of it, to be summed."""
        return counted(model, batch, all_logits=self.all_logits, packing=self.packing)

    def loss(self, outputs: Counted, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and the number of tokens that count."""
        return outputs.total(), torch.tensor(outputs.labels.numel(), device=outputs.labels.device)

    def update(self, metrics: MetricCollection, outputs: Counted, batch: dict[str, Any]) -> None:
        """Adds a batch to the share of tokens that the model would have written itself."""
        metrics["token_accuracy"].update((outputs.logits.argmax(-1) == outputs.labels).float())

    def from_loss(self, loss: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Perplexity, and bits a byte where the bytes were counted.

        Args:
            loss: the mean over all tokens, in nats.
            values: the metrics.
        """
        found = {"perplexity": torch.exp(loss)}
        if "bytes_per_token" in values:
            found["bits_per_byte"] = loss / math.log(2) / values["bytes_per_token"]
        return found


def before_text(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: nothing, a beginning of text, or BERT's ``[CLS]``."""
    empty = tokenizer("")["input_ids"]
    first = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return [t for t in empty[:1] if t in first]


def end_of_text(tokenizer: Any) -> list[int]:
    """The token that ends a text; BERT-like tokenizers have ``[SEP]`` for it."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return [int(token)]
    return []


def without_beginning(ids: list[int], tokenizer: Any, max_length: int) -> list[int]:
    """A prompt's last tokens, behind the one that begins a text where it has one.

    Args:
        ids: the prompt.
        tokenizer: a Hugging Face tokenizer.
        max_length: how many tokens may stay.
    """
    first = ids[:1] if ids[:1] and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    rest = ids[len(first) :]
    return first + rest[max(0, len(ids) - max_length) :]


def prompt_that_fits(ids: list[int], answer: int, tokenizer: Any, max_length: int) -> list[int]:
    """A prompt without its beginning, so that the whole answer or a quarter of the window is left for that.

    Args:
        ids: the prompt.
        answer: how many tokens the answer has.
        tokenizer: a Hugging Face tokenizer.
        max_length: the window.
    """
    return without_beginning(ids, tokenizer, max_length - min(answer, max(1, max_length // 4)))


@torch.no_grad()
def write(model: Any, batch: dict[str, Any], tokenizer: Any, ends: list[int], **generation: Any) -> list[str]:
    """What the model writes behind each prompt; greedy, 64 tokens at most, unless told otherwise.

    Args:
        model: a Hugging Face model that generates.
        batch: prompts that are padded on the left.
        tokenizer: a Hugging Face tokenizer.
        ends: the tokens at which to stop.
        **generation: options of ``generate``.
    """
    options = {"max_new_tokens": 64, "do_sample": False, **generation}
    options.setdefault("eos_token_id", ends or None)
    options.setdefault("pad_token_id", pad_token(tokenizer))
    prompts = batch["input_ids"]
    ids = model.generate(input_ids=prompts, attention_mask=batch["attention_mask"], **options)
    texts: list[str] = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    return texts
