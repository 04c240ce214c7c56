"""The shapes of supervised data: pairs of texts, instructions, messages, ShareGPT."""

from __future__ import annotations

from typing import Any

from lightning_peft.tasks.messages import Message, read_messages, read_sharegpt, read_tools

# Alpaca's two prompts, https://github.com/tatsu-lab/stanford_alpaca
_ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)
_ALSO = ", paired with an input that provides further context"


def plain_pair_of(row: dict[str, Any], *, has_template: bool) -> tuple[str, str] | None:
    """Prompt and completion as plain texts, or None where the row is a conversation.

    Args:
        row: the row.
        has_template: whether there is a chat template; then instructions are conversations.

    Raises:
        ValueError: if an instruction is empty.
    """
    if isinstance(row.get("prompt"), list) or "messages" in row or "conversations" in row:
        return None
    if "prompt" in row:
        if isinstance(row.get("completion"), list):
            raise ValueError("has messages as completion, but a text as prompt; give both in the same form")
        return str(row["prompt"]), str(row.get("completion") or "")
    if has_template:
        return None
    given = str(row.get("input") or "").strip()
    prompt = _ALPACA.format(
        also=_ALSO if given else "",
        instruction=_instruction(row),
        input=f"\n\n### Input:\n{given}" if given else "",
    )
    return prompt, str(row.get("output") or "")


def conversation_of(row: dict[str, Any], *, training: bool) -> tuple[list[Message], Any, int]:
    """The row's messages, its tools, and which message is the first that may be learnt from.

    Args:
        row: the row.
        training: with the answer; otherwise a last turn of the assistant is left out, to be written again.

    Raises:
        ValueError: if the row is no conversation.
    """
    tools = read_tools(row.get("tools"))
    first = 0
    if "messages" in row:
        messages = read_messages(row["messages"])
    elif "conversations" in row:
        messages = read_sharegpt(row["conversations"], row.get("system"))
    elif "prompt" in row:
        messages = read_messages(row["prompt"], "prompt")
        first = len(messages)
        if training:
            completion = row["completion"]
            said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            messages += read_messages(said, "completion")
        return messages, tools, first
    else:
        given = str(row.get("input") or "").strip()
        messages = [{"role": "user", "content": _instruction(row) + (f"\n\n{given}" if given else "")}]
        if training:
            messages += read_messages([{"role": "assistant", "content": str(row.get("output") or "")}], "output")
    if not training and len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages, tools, first


def _instruction(row: dict[str, Any]) -> str:
    text = str(row["instruction"]).strip()
    if not text:
        raise ValueError("has an empty instruction")
    return text
