"""Regular expressions out of files: those that could take an age on a module's name are told from the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MOST = 5  # parts such as ".*", of which each more lets a match take a name's length times as long
_LONGEST = 2000


def refuse_slow_patterns(options: Mapping[str, Any]) -> None:
    """Refuses expressions on which Python's ``re`` may go through more ways than there is time for.

    Args:
        options: a method's. Texts in entries whose name has ``modules`` or ``pattern`` in it are expressions, as are
            the keys of dictionaries there; lists hold names.

    Raises:
        ValueError: if one repeats what is itself of any length and nothing sets apart, such as ``(a+)+``, has too many
            parts of any length, or is no expression.
    """
    for option, pattern in _patterns(options):
        try:
            parts = list(re._parser.parse(pattern)) if len(pattern) <= _LONGEST else None  # type: ignore[attr-defined]
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{option}: {pattern[:80]!r} is no regular expression: {error}") from error
        if parts is None or _is_ambiguous(parts) or _repeats(parts) > _MOST:
            raise ValueError(
                f"{option}: {pattern[:80]!r} may take longer to match than anybody waits; write it without repeats "
                f"within repeats and with {_MOST} parts such as '.*' at most"
            )


def _patterns(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for option, value in options.items():
        if isinstance(value, Mapping) and "pattern" not in option:
            yield from _patterns({str(k): v for k, v in value.items()})
        elif "modules" in option or "pattern" in option:
            texts = list(value) if isinstance(value, Mapping) else [value]
            yield from ((option, t) for t in texts if isinstance(t, str))


def _inside(operation: Any, argument: Any) -> list[list[Any]]:
    """The sequences that an element of an expression is made of."""
    name = str(operation)
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return [list(argument[2])]
    if name == "BRANCH":
        return [list(branch) for branch in argument[1]]
    if name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [list(argument[-1])]
    return [list(argument)] if name == "ATOMIC_GROUP" else []


def _is_long(operation: Any, argument: Any) -> bool:
    return "REPEAT" in str(operation) and argument[1] > 8


def _repeats(parts: list[Any]) -> int:
    return sum(_is_long(*part) + sum(map(_repeats, _inside(*part))) for part in parts)


def _is_ambiguous(parts: list[Any]) -> bool:
    for operation, argument in parts:
        inside = _inside(operation, argument)
        if _is_long(operation, argument) and not _has_anchor(inside[0]):
            return True
        if any(map(_is_ambiguous, inside)):
            return True
    return False


def _has_anchor(parts: list[Any]) -> bool:
    """Whether something of one length stands in a sequence that is repeated: then repeats can be told apart."""
    if any(str(o) in ("LITERAL", "NOT_LITERAL", "IN", "ANY") for o, _ in parts):
        return True
    groups = [_inside(o, a) for o, a in parts if str(o) in ("SUBPATTERN", "ATOMIC_GROUP")]
    return any(_has_anchor(inner) for group in groups for inner in group)
