"""Supervised fine-tuning: the answers to prompts, instructions and conversations; the loss counts on the answers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.conversing import Conversing
from lightning_peft.tasks.instructions import conversation_of, plain_pair_of
from lightning_peft.tasks.language_model import (
    NextToken,
    before_text,
    end_of_text,
    prompt_that_fits,
    without_beginning,
    write,
)
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs
from lightning_peft.tasks.written_texts import update_written, written_metrics


@dataclass
class SupervisedFineTuning(Conversing, NextToken):
    """Learns to answer: the loss counts on completions, or on every turn of an assistant, and on what ends them.

    Plain texts (``prompt``/``completion``; ``instruction``/``output`` where there is no chat template) that are too
    long lose the prompt's beginning first, so that a quarter of the window or the whole completion stays, then the
    completion's end. Conversations lose their end; one of which no answer is left within the window is an error.

    Args:
        chat_template: the form of conversations: ``"chatml"``, ``"zephyr"`` or ``"alpaca"``, a ``.jinja`` file, or
            Jinja; after construction it is the template's text. None takes the tokenizer's own.
        predict_with_generate: whether validation and test also write the last answer of every row and compare it with
            the expected one (exact match, BLEU, chrF, ROUGE). Off by default, since writing takes many times as long.
        all_logits: whether logits are computed for all tokens, as the model does by itself, not only for those that
            the loss counts and in chunks. Results are the same; it takes more memory and time.
        packing: whether rows of a batch are put one behind the other instead of padded, where the model keeps them
            apart. Results are the same; without it padding takes memory and time too.

    Raises:
        ValueError: if the template's name is unknown.
        FileNotFoundError: if its file is not there.
    """

    chat_template: str | None = None
    predict_with_generate: bool = False
    all_logits: bool = False
    packing: bool = True

    columns: ClassVar[tuple[Columns, ...]] = (
        Columns(("prompt",), ("completion",), ("tools",)),
        Columns(("messages",), (), ("tools",)),
        Columns(("instruction",), ("output",), ("input",)),
        Columns(("conversations",), (), ("system", "tools")),
    )
    whole_texts: ClassVar[bool] = False

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values, the chat template in full."""
        return {
            "name": "sft",
            "chat_template": self.chat_template,
            "predict_with_generate": self.predict_with_generate,
        }

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, and labels that are -100 on all but the answers.

        Raises:
            ValueError: if a row has no answer to learn from, or is no conversation that the chat template takes.
            RuntimeError: if there is no chat template for conversations, or none that can be learnt from.
        """
        has_template = self._has_template(tokenizer)
        chat_for = functools.cache(functools.partial(self._chat, tokenizer))
        features = []
        for row in rows:
            plain = plain_pair_of(row, has_template=has_template)
            if plain is not None:
                features.append(_plain(*plain, tokenizer, max_length, training))
                continue
            messages, tools, first = conversation_of(row, training=training)
            chat = chat_for(bool(tools))
            if training:
                features.append(_answers(*chat.encode(messages, tools, first), max_length))
            else:
                prompt = chat.encode_prompt(messages, tools)
                features.append({"input_ids": without_beginning(prompt, tokenizer, max_length)})
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, tokens)``; prompts alone are padded on the left."""
        batch = pad_inputs(features, tokenizer, left=not training)
        if training:
            batch["labels"] = pad([f["labels"] for f in features], IGNORED)
        return batch

    def metrics(self) -> MetricCollection:
        """The share of supervised tokens that the model would have written itself, and how its answers compare."""
        found = written_metrics() if self.predict_with_generate else MetricCollection({})
        found.add_metrics({"token_accuracy": MeanMetric()})
        return found

    def score_written(
        self, metrics: MetricCollection, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any
    ) -> None:
        """Adds how the model's own answers compare with the last one of each row.

        Args:
            metrics: those of the task.
            model: a Hugging Face model that generates.
            batch: a batch with labels.
            tokenizer: a Hugging Face tokenizer.
            **generation: options of ``generate``.
        """
        if not self.predict_with_generate:
            return
        prompts, expected = _last_answers(batch)
        inputs = self.collate([{"input_ids": p} for p in prompts], tokenizer, training=False)
        inputs = {name: tensor.to(batch["input_ids"].device) for name, tensor in inputs.items()}
        longest = max(len(e) for e in expected)
        written = self._write(model, inputs, tokenizer, **{"max_new_tokens": longest, **generation})
        update_written(metrics, written, tokenizer.batch_decode(expected, skip_special_tokens=True))

    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The answer that the model writes to each prompt; greedy, 64 tokens at most, unless told otherwise."""
        return [{"completion": t} for t in self._write(model, batch, tokenizer, **generation)]

    def _write(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[str]:
        return write(model, batch, tokenizer, self._ends(tokenizer), **generation)


def _plain(prompt: str, completion: str, tokenizer: Any, max_length: int, training: bool) -> dict[str, Any]:
    start = before_text(tokenizer)
    options = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(prompt, **options)["input_ids"]
    if not training:
        return {"input_ids": without_beginning(start + ids, tokenizer, max_length)}
    # as one text, so that nothing is put before the completion, unless its first letters join the prompt's last
    whole = tokenizer(prompt + completion, **options)["input_ids"]
    said = whole[len(ids) :] if whole[: len(ids)] == ids else tokenizer(completion, **options)["input_ids"]
    if not said:
        raise ValueError(f"has no supervised token: its completion is {completion!r}")
    said = said + end_of_text(tokenizer)
    before = prompt_that_fits(start + ids, len(said), tokenizer, max_length)
    said = said[: max_length - len(before)]
    return {"input_ids": before + said, "labels": [IGNORED] * len(before) + said}


def _answers(ids: list[int], labels: list[int], max_length: int) -> dict[str, Any]:
    if all(label == IGNORED for label in labels[1:max_length]):
        at = next(i for i, label in enumerate(labels, start=1) if label != IGNORED)
        raise ValueError(
            f"has no supervised token among its first {max_length} of {len(ids)}: the first answer begins with token "
            f"{at}; raise data.max_length"
        )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _last_answers(batch: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The ids before the last supervised run of each row, and those of the run."""
    prompts, answers = [], []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
        start = max((i + 1 for i, label in enumerate(labels[:end]) if label == IGNORED), default=0)
        prompts.append(ids[:start])
        answers.append(ids[start:end])
    return prompts, answers
