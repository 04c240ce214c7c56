"""Pairs of answers to a prompt as token ids: texts, conversations, or conversations that begin alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_peft.core.problems import an
from lightning_peft.tasks.chat import Chat
from lightning_peft.tasks.language_model import before_text, end_of_text, prompt_that_fits, without_beginning
from lightning_peft.tasks.messages import Message, read_messages, read_tools
from lightning_peft.tasks.padding import IGNORED

Ids = list[int]
ChatFor = Callable[[bool], Chat]


class Answer(NamedTuple):
    """Tokens behind a prompt.

    Attributes:
        ids: the tokens.
        labels: those that the assistant wrote; -100 on what lies between its turns.
    """

    ids: Ids
    labels: Ids


def pair_of(row: dict[str, Any], tokenizer: Any, chat_for: ChatFor, max_length: int) -> tuple[Ids, Answer, Answer]:
    """Prompt, chosen and rejected answer, each prompt and answer together ``max_length`` tokens at most.

    What is too long loses the prompt's beginning first, so that a quarter of the window or the whole longer answer
    stays, then the answers' ends.

    Args:
        row: ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages; lists may go without a prompt.
        tokenizer: a Hugging Face tokenizer.
        chat_for: the template for conversations with or without tools.
        max_length: the window.

    Raises:
        ValueError: if the row is no pair of answers to one prompt.
    """
    if isinstance(row["chosen"], str):
        prompt, chosen, rejected = _texts(row, tokenizer)
    else:
        prompt, chosen, rejected = _conversations(row, tokenizer, chat_for)
    if chosen == rejected:
        raise ValueError("has the same answer as chosen and as rejected")
    prompt = prompt_that_fits(prompt, max(len(chosen.ids), len(rejected.ids)), tokenizer, max_length)
    room = max_length - len(prompt)
    return prompt, Answer(*(v[:room] for v in chosen)), Answer(*(v[:room] for v in rejected))


def prompt_of(row: dict[str, Any], tokenizer: Any, chat_for: ChatFor, max_length: int) -> Ids:
    """The prompt of a row, without its beginning where that is too long.

    Args:
        row: ``prompt``, a text or a list of messages; or two lists of messages that begin alike.
        tokenizer: a Hugging Face tokenizer.
        chat_for: the template for conversations with or without tools.
        max_length: the window.

    Raises:
        ValueError: if there is no prompt.
    """
    prompt, paired = row.get("prompt"), "rejected" in row and not isinstance(row["chosen"], str)
    if isinstance(prompt, str) and not paired:
        ids = before_text(tokenizer) + _ids(prompt, tokenizer)
    elif paired or prompt is not None:
        messages, tools = _messages(row)[0] if paired else read_messages(prompt, "prompt"), read_tools(row.get("tools"))
        ids = chat_for(bool(tools)).encode_prompt(messages, tools)
    else:
        raise ValueError("has no column 'prompt'")
    return without_beginning(ids, tokenizer, max_length)


def _texts(row: dict[str, Any], tokenizer: Any) -> tuple[Ids, Answer, Answer]:
    if not isinstance(row["rejected"], str) or not isinstance(row.get("prompt", ""), str):
        raise _mixed(row)
    if "prompt" not in row:
        raise ValueError("has no column 'prompt', which only conversations can go without")
    answers = []
    for name in ("chosen", "rejected"):
        ids, end = _ids(row[name], tokenizer), end_of_text(tokenizer)
        if not ids:
            raise ValueError(f"has an empty {name} answer")
        ids += [] if ids[-1:] == end else end  # some texts bring their end
        answers.append(Answer(ids, ids))
    return before_text(tokenizer) + _ids(row["prompt"], tokenizer), answers[0], answers[1]


def _mixed(row: dict[str, Any]) -> ValueError:
    kinds = ", ".join(f"{c} is {an(type(row[c]).__name__)}" for c in ("prompt", "chosen", "rejected") if c in row)
    return ValueError(f"mixes texts and messages: {kinds}")


def _ids(text: str, tokenizer: Any) -> Ids:
    found: Ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _conversations(row: dict[str, Any], tokenizer: Any, chat_for: ChatFor) -> tuple[Ids, Answer, Answer]:
    prompt, chosen, rejected = _messages(row)
    tools = read_tools(row.get("tools"))
    chat = chat_for(bool(tools))
    before, answers = [], []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[0]["role"] != "assistant":
            raise ValueError(f"has a {name} answer that does not begin with a turn of the assistant")
        ids, labels = chat.encode(prompt + messages, tools, len(prompt))
        where = [i for i, label in enumerate(labels) if label != IGNORED]
        before.append(ids[: where[0]])
        answers.append(Answer(*(values[where[0] : where[-1] + 1] for values in (ids, labels))))
    if before[0] != before[1]:
        raise ValueError(
            f"has a prompt that the chat template writes otherwise before the rejected answer: "
            f"{_difference(before[0], before[1], tokenizer)}"
        )
    return before[0], answers[0], answers[1]


def _messages(row: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and both answers; whole conversations beside a prompt begin with it, and lose it."""
    given = row.get("prompt")
    if isinstance(row["rejected"], str):
        raise _mixed(row)
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen", "rejected"))
    if given is None or isinstance(given, str):
        prompt = _common(chosen, rejected, row)
        if given is not None and prompt[-1]["content"].strip() != given.strip():
            raise _mixed(row)
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    prompt = read_messages(given, "prompt")
    if all(answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _common(chosen: list[Message], rejected: list[Message], row: dict[str, Any]) -> list[Message]:
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same == 0 and "prompt" in row:
        raise _mixed(row)
    if not same:
        what = "do not begin alike" if same == 0 else "do not differ in a message"
        raise ValueError(f"has no column 'prompt', and its chosen and rejected conversations {what}")
    return chosen[:same]


def _difference(one: Ids, other: Ids, tokenizer: Any) -> str:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ours, theirs = (tokenizer.decode(ids[same : same + 8]) for ids in (one, other))
    return f"{theirs!r} instead of {ours!r}"
