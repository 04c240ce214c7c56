"""Conversations as people write them, as messages that a chat template takes."""

from __future__ import annotations

import json
from typing import Any

from lightning_peft.core.problems import an, nearest

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# roles as others call them; templates know the four alone
_OTHER_NAMES = {**_SHAREGPT, "developer": "system", "bot": "assistant", "function": "tool", "ipython": "tool"}


def read_messages(value: Any, column: str = "messages") -> list[Message]:
    """Checks messages with ``role`` and ``content``.

    Args:
        value: a list of messages, or its JSON. ``content`` is a string or a list of parts of text. An assistant's
            message may have ``tool_calls``; their arguments are an object or its JSON.
        column: where they stand.

    Returns:
        New messages: contents are strings, arguments are objects, and what is None is left out.

    Raises:
        ValueError: if a role is unknown, a message says nothing, or the shape is another.
    """
    return [_message(m, f"message {i} of {column!r}") for i, m in enumerate(_list(value, column), start=1)]


def read_sharegpt(value: Any, system: Any = None) -> list[Message]:
    """Messages from ShareGPT's turns with ``from`` and ``value``.

    Args:
        value: a list of turns, or its JSON. ``from`` is system, human, gpt, function_call (``value`` is the call as
            JSON), or tool, observation or function_response.
        system: a system prompt that stands beside them.

    Raises:
        ValueError: as `read_messages`.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(_list(value, "conversations"), start=1):
        where = f"turn {number} of 'conversations'"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            is_message = isinstance(turn, dict) and "role" in turn
            hint = "; name the column of messages with data.columns.messages=conversations" if is_message else ""
            raise ValueError(f"has no 'from' and 'value' in {where}: {_short(turn)}{hint}")
        speaker = str(turn["from"])
        if speaker not in _SHAREGPT:
            raise ValueError(f"has an unknown 'from' {speaker!r} in {where}{nearest(speaker, _SHAREGPT)}")
        if speaker == "function_call":
            calls = _json(turn["value"], where)
            messages.append({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]})
        else:
            messages.append({"role": _SHAREGPT[speaker], "content": turn["value"]})
    return read_messages(messages, "conversations")


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Descriptions of tools in the form that chat templates expect.

    Args:
        value: a list of JSON schemas, or its JSON; a bare ``{"name": ..., "parameters": ...}`` is taken too.

    Raises:
        ValueError: if it is something else.
    """
    if value in (None, "", "[]", []):
        return None
    tools = _list(value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"has a tool that is no object: {_short(next(t for t in tools if not isinstance(t, dict)))}")
    wrapped = [_without_none(tool) for tool in tools]
    return [t if "function" in t else {"type": "function", "function": t} for t in wrapped]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict) or "role" not in given:
        raise ValueError(f"has no 'role' in {where}: {_short(given)}")
    message: Message = {k: v for k, v in given.items() if v is not None}
    role = str(message["role"])
    if role not in ROLES:
        meant = f"; did you mean {_OTHER_NAMES[role]!r}?" if role in _OTHER_NAMES else nearest(role, ROLES)
        raise ValueError(f"has an unknown role {role!r} in {where}{meant}")
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_text(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"has {an(type(content).__name__)} as content in {where}; expected a text")
    calls = message.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise ValueError(f"has tool calls of role {role!r} in {where}; only an assistant calls tools")
        message["tool_calls"] = [_call(call, where) for call in _list(calls, "tool_calls")]
    elif not content.strip() and role != "tool":
        raise ValueError(f"has an empty content of role {role!r} in {where}")
    return {**message, "content": content}


def _call(given: Any, where: str) -> dict[str, Any]:
    call = {"function": given} if isinstance(given, dict) and "function" not in given else given
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"has a tool call without a function's name in {where}: {_short(given)}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, where)
    return {"type": "function", **call, "function": {**function, "arguments": _without_none(arguments)}}


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"has a part of content that is no text in {where}: {_short(part)}")


def _list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, repr(column))
    if not isinstance(value, list):
        raise ValueError(f"has {an(type(value).__name__)} in {column!r}; expected a list")
    if not value:
        raise ValueError(f"has an empty list in {column!r}")
    return value


def _json(value: Any, where: str) -> Any:
    try:
        return value if isinstance(value, dict | list) else json.loads(value)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"has no JSON in {where}: {_short(value)}") from error


def _without_none(value: Any) -> Any:
    """Tables have one set of fields for all rows: those of other rows' objects are None in this one."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
