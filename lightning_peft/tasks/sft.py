"""Supervised fine-tuning: the answers to prompts, instructions and conversations; the loss counts on the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.tasks.chat import Chat, template_text
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.instructions import conversation_of, plain_pair_of
from lightning_peft.tasks.language_model import (
    NextToken,
    before_text,
    end_of_text,
    without_beginning,
    write,
)
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs


@dataclass
class SupervisedFineTuning(NextToken):
    """Learns to answer: the loss counts on completions, or on every turn of an assistant, and on what ends them.

    Plain texts (``prompt``/``completion``; ``instruction``/``output`` where there is no chat template) that are too
    long lose the prompt's beginning first, so that a quarter of the window or the whole completion stays, then the
    completion's end. Conversations lose their end; one of which no answer is left within the window is an error.

    Args:
        chat_template: the form of conversations: ``"chatml"``, ``"zephyr"`` or ``"alpaca"``, a ``.jinja`` file, or
            Jinja; after construction it is the template's text. None takes the tokenizer's own.
        predict_with_generate: whether validation and test also write the last answer of every row and compare it with
            the expected one (exact match, ROUGE-L). Off by default, since writing takes many times as long.

    Raises:
        ValueError: if the template's name is unknown.
        FileNotFoundError: if its file is not there.
    """

    chat_template: str | None = None
    predict_with_generate: bool = False

    columns: ClassVar[tuple[Columns, ...]] = (
        Columns(("prompt",), ("completion",), ("tools",)),
        Columns(("messages",), (), ("tools",)),
        Columns(("instruction",), ("output",), ("input",)),
        Columns(("conversations",), (), ("system", "tools")),
    )
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.chat_template is not None:
            self.chat_template = template_text(self.chat_template)

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values, the chat template in full."""
        return {
            "name": "sft",
            "chat_template": self.chat_template,
            "predict_with_generate": self.predict_with_generate,
        }

    def tokenizer_for(self, tokenizer: Any) -> Any:
        """The tokenizer with the template that conversations get; it goes with the adapter.

        Args:
            tokenizer: a Hugging Face tokenizer of which nobody else knows.
        """
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def _chat(self, tokenizer: Any, tools: Any = None) -> Chat | None:
        if self.chat_template is None and not tokenizer.chat_template:
            return None
        return Chat(tokenizer, self.chat_template or tokenizer.get_chat_template(None, tools))

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, and labels that are -100 on all but the answers.

        Raises:
            ValueError: if a row has no answer to learn from, or is no conversation that the chat template takes.
            RuntimeError: if there is no chat template for conversations, or none that can be learnt from.
        """
        has_template = self.chat_template is not None or bool(tokenizer.chat_template)
        chats: dict[bool, Chat | None] = {}
        features = []
        for row in rows:
            plain = plain_pair_of(row, has_template=has_template)
            if plain is not None:
                features.append(_plain(*plain, tokenizer, max_length, training))
                continue
            messages, tools, first = conversation_of(row, training=training)
            if bool(tools) not in chats:  # a tokenizer may have another template for conversations with tools
                chats[bool(tools)] = self._chat(tokenizer, tools)
            chat = chats[bool(tools)]
            if chat is None:
                raise RuntimeError(
                    "the data has conversations, but the tokenizer has no chat template; name one with "
                    "task.chat_template=zephyr, chatml or a .jinja file"
                )
            features.append(_answers(chat, messages, tools, first, max_length, training))
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, tokens)``; prompts alone are padded on the left."""
        batch = pad_inputs(features, tokenizer, left=not training)
        if training:
            batch["labels"] = pad([f["labels"] for f in features], IGNORED)
        return batch

    def metrics(self) -> MetricCollection:
        """The share of supervised tokens that the model would have written itself, and how its answers compare."""
        names = ["token_accuracy", *(("exact_match", "rougeL") if self.predict_with_generate else ())]
        return MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)

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
        from torchmetrics.functional.text import rouge_score

        prompts, expected = _last_answers(batch)
        wanted = [t.strip() for t in tokenizer.batch_decode(expected, skip_special_tokens=True)]
        inputs = self.collate([{"input_ids": p} for p in prompts], tokenizer, training=False)
        inputs = {name: tensor.to(batch["input_ids"].device) for name, tensor in inputs.items()}
        longest = max(len(e) for e in expected)
        written = self._write(model, inputs, tokenizer, **{"max_new_tokens": longest, **generation})
        for said, answer in zip(written, wanted, strict=True):
            metrics["exact_match"].update(float(said.strip() == answer))
            score = rouge_score(said, answer, rouge_keys="rougeL")["rougeL_fmeasure"]
            metrics["rougeL"].update(score.to(batch["input_ids"].device))

    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The answer that the model writes to each prompt; greedy, 64 tokens at most, unless told otherwise."""
        return [{"completion": t} for t in self._write(model, batch, tokenizer, **generation)]

    def _write(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[str]:
        ends = end_of_text(tokenizer)
        chat = self._chat(tokenizer)
        if chat is not None:
            ends = list(dict.fromkeys([chat.end, *ends]))
        return write(model, batch, tokenizer, ends, **generation)


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
    kept = min(len(said), max(1, max_length // 4))
    ids = ids[-max(0, max_length - len(start) - kept) :] if len(start) + kept < max_length else []
    before = start + ids
    said = said[: max_length - len(before)]
    return {"input_ids": before + said, "labels": [IGNORED] * len(before) + said}


def _answers(
    chat: Chat, messages: list[dict[str, Any]], tools: Any, first: int, max_length: int, training: bool
) -> dict[str, Any]:
    options = {"add_special_tokens": False, "verbose": False}  # a template writes its own beginning
    if not training:
        ids = chat.tokenizer(chat.text(messages, tools, prompt=True), **options)["input_ids"]
        return {"input_ids": without_beginning(ids, chat.tokenizer, max_length)}
    text, spans = chat.with_answers(messages, tools, first)
    found = chat.tokenizer(text, return_offsets_mapping=True, **options)
    ids, begins = np.array(found["input_ids"]), np.array(found["offset_mapping"])[:, 0]
    # a token that begins before the answer, such as a header that swallows the space behind it, is the header's
    counts = np.any([(begins >= start) & (begins < end) for start, end in spans], axis=0)
    labels = np.where(counts, ids, IGNORED)[:max_length]
    if (labels[1:] == IGNORED).all():
        at = int(counts.argmax()) + 1
        raise ValueError(
            f"has no supervised token among its first {max_length} of {len(ids)}: the first answer begins with token "
            f"{at}; raise data.max_length"
        )
    return {"input_ids": ids[:max_length].tolist(), "labels": labels.tolist()}


def _last_answers(batch: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The ids before the last supervised run of each row, and those of the run."""
    prompts, answers = [], []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
        start = max((i + 1 for i, label in enumerate(labels[:end]) if label == IGNORED), default=0)
        prompts.append(ids[:start])
        answers.append(ids[start:end])
    return prompts, answers
