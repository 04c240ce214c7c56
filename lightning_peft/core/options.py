"""Options against their annotations and the usual ranges: what does not fit is named before anything uses it."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_peft.core.problems import raise_problems

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    types.NoneType: ("None", "None"),
    Any: ("anything", "anything"),
}

_LARGEST = 3.4028234663852886e38  # of float32, in which adapters are


def check_types(options: Any) -> None:
    """Compares every option with its annotation; the first thing that a method's ``__post_init__`` does.

    A tuple, or another library's list or mapping (OmegaConf's, when Hydra does not convert), becomes a plain one:
    options are written into checkpoints and JSON. A bool is no number, a whole number is one, and all are finite.

    Args:
        options: an instance of a dataclass whose annotations are made of bool, int, float, str, None, lists,
            dictionaries and unions of these.

    Raises:
        ValueError: if a value is of another type or not finite; all such are named at once.
    """
    hints = get_type_hints(type(options))
    problems: list[str] = []
    for option in fields(options):
        value, hint = _plain(getattr(options, option.name)), hints[option.name]
        setattr(options, option.name, value)
        if not _is_a(value, hint):
            problems.append(f"{option.name} must be {_said(hint)}, but got {value!r}")
        elif not _is_finite(value):
            problems.append(f"{option.name} must be finite, but got {value!r}")
    raise_problems(type(options).__name__, problems)


def range_problems(
    options: Any, *, counts: Sequence[str] = (), positive: Sequence[str] = (), shares: Sequence[str] = ()
) -> list[str]:
    """What is wrong with numbers of the usual ranges, a sentence each; options that are None are passed over.

    Args:
        options: what holds them.
        counts: names of those that must be 1 or more.
        positive: names of those that must be above 0.
        shares: names of those that must be at least 0 and below 1.
    """
    ranges: list[tuple[Sequence[str], str, Callable[[float], bool]]] = [
        (counts, "1 or more", lambda value: value >= 1),
        (positive, "above 0", lambda value: value > 0),
        (shares, "at least 0 and below 1", lambda value: 0 <= value < 1),
    ]
    return [
        f"{name} must be {said}, but got {value}"
        for names, said, fits in ranges
        for name in names
        if (value := getattr(options, name)) is not None and not fits(value)
    ]


def misfits(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """The keys under which there is nothing, or something of another type.

    Args:
        values: what was read from a file.
        hints: what each key is to hold, in the terms of `check_types`.
    """
    return [k for k, hint in hints.items() if k not in values or not _is_a(values[k], hint)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(v) for v in value]
    return value


def _is_a(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is_a(value, h) for h in inner)
    if kind is list:
        return isinstance(value, list) and all(_is_a(v, inner[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(k, inner[0]) and _is_a(v, inner[1]) for k, v in value.items())
    if hint is Any:
        return True
    if isinstance(value, bool) and hint is not bool:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(_is_finite(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or (math.isfinite(value) and abs(value) <= _LARGEST)


def _said(hint: Any, *, many: bool = False) -> str:
    """The annotation in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        *first, last = [_said(h, many=many) for h in inner]
        return f"{', '.join(first)} or {last}"
    if kind is list:
        return f"{'lists' if many else 'a list'} of {_said(inner[0], many=True)}"
    if kind is dict:
        return f"{'dictionaries' if many else 'a dictionary'} from {' to '.join(_said(h, many=True) for h in inner)}"
    return _WORDS[hint][many]
