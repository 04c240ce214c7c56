"""Pairs of answers to a prompt as token ids: texts, conversations, or conversations that begin alike."""

from __future__ import annotations

from typing import Any

from lightning_peft.tasks.language_model import before_text, end_of_text

Ids = list[int]


def pair_of(row: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[Ids, Ids, Ids]:
    """Prompt, chosen and rejected answer, each prompt and answer together ``max_length`` tokens at most.

    What is too long loses the prompt's beginning first, so that a quarter of the window or the whole longer answer
    stays, then the answers' ends.

    Args:
        row: ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages; lists may go without a prompt.
        tokenizer: a Hugging Face tokenizer, with a chat template if there are messages.
        max_length: the window.

    Raises:
        ValueError: if the row is no pair of answers to one prompt.
    """
    if isinstance(row["chosen"], str):
        prompt, chosen, rejected = _texts(row, tokenizer)
    else:
        prompt, chosen, rejected = _conversations(row, tokenizer)
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if not ids:
            raise ValueError(f"has an empty {name} answer")
    if chosen == rejected:
        raise ValueError("has the same answer as chosen and as rejected")
    kept = min(max(len(chosen), len(rejected)), max(1, max_length // 4))
    prompt = _last(prompt, max_length - kept, tokenizer)
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def prompt_of(row: dict[str, Any], tokenizer: Any, max_length: int) -> Ids:
    """The prompt of a row, without its beginning where that is too long.

    Args:
        row: ``prompt``, a text or a list of messages; or two lists of messages that begin alike.
        tokenizer: a Hugging Face tokenizer.
        max_length: the window.

    Raises:
        ValueError: if there is no prompt.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return _last(before_text(tokenizer) + _ids(prompt, tokenizer), max_length, tokenizer)
    if prompt is None:
        if "rejected" not in row or isinstance(row["chosen"], str):
            raise ValueError("has no column 'prompt'")
        prompt = _common(_plain(row["chosen"]), _plain(row["rejected"]))
    return _last(_rendered(_plain(prompt), tokenizer, prompt=True), max_length, tokenizer)


def _texts(row: dict[str, Any], tokenizer: Any) -> tuple[Ids, Ids, Ids]:
    if not isinstance(row["rejected"], str) or not isinstance(row.get("prompt", ""), str):
        raise _mixed(row)
    if "prompt" not in row:
        raise ValueError("has no column 'prompt', which only conversations can go without")
    prompt = before_text(tokenizer) + _ids(row["prompt"], tokenizer)
    return prompt, _answer(row["chosen"], tokenizer), _answer(row["rejected"], tokenizer)


def _mixed(row: dict[str, Any]) -> ValueError:
    kinds = ", ".join(f"{c} is a {type(row[c]).__name__}" for c in ("prompt", "chosen", "rejected") if c in row)
    return ValueError(f"mixes texts and messages: {kinds}")


def _answer(text: str, tokenizer: Any) -> Ids:
    ids, end = _ids(text, tokenizer), end_of_text(tokenizer)
    return ids + end if ids and ids[-1:] != end else ids  # some texts bring their end


def _ids(text: str, tokenizer: Any) -> Ids:
    found: Ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _conversations(row: dict[str, Any], tokenizer: Any) -> tuple[Ids, Ids, Ids]:
    if isinstance(row["rejected"], str) or isinstance(row.get("prompt"), str):
        raise _mixed(row)
    chosen, rejected = _plain(row["chosen"]), _plain(row["rejected"])
    given = row.get("prompt")
    prompt = _common(chosen, rejected) if given is None else _plain(given)
    if given is not None:
        chosen, rejected = prompt + chosen, prompt + rejected
    before = _rendered(prompt, tokenizer, prompt=True)
    answers = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        whole = _rendered(messages, tokenizer, prompt=False)
        if whole[: len(before)] != before:
            raise ValueError(
                f"the chat template writes the prompt otherwise when the {name} answer follows: "
                f"{_difference(before, whole, tokenizer)}"
            )
        answers.append(whole[len(before) :])
    return before, answers[0], answers[1]


def _difference(prompt: Ids, whole: Ids, tokenizer: Any) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    ours, theirs = (tokenizer.decode(ids[same : same + 8]) for ids in (prompt, whole))
    return f"{theirs!r} instead of {ours!r}"


def _plain(messages: Any) -> list[dict[str, Any]]:
    """Messages without the empty entries that tables give to all rows if one has them."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f"expected a text or a list of messages with role and content, but got {messages!r:.80}")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _common(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if not same:
        what = "do not begin alike" if same == 0 else "do not differ in a message"
        raise ValueError(f"has no column 'prompt', and its chosen and rejected conversations {what}")
    return chosen[:same]


def _rendered(messages: list[dict[str, Any]], tokenizer: Any, *, prompt: bool) -> Ids:
    if not tokenizer.chat_template:
        raise ValueError("is a conversation, but the tokenizer has no chat template")
    ids: Ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    return ids


def _last(prompt: Ids, room: int, tokenizer: Any) -> Ids:
    """The last tokens that have room, behind the one that begins a text where there is one."""
    if len(prompt) <= room:
        return prompt
    first = before_text(tokenizer)
    first = first if prompt[: len(first)] == first and len(first) < room else []
    return first + prompt[len(prompt) - (room - len(first)) :] if room > 0 else []
