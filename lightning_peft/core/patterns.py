"""Regular expressions out of files: those that could take an age on a module's name are told from the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Four parts such as ".*" can end in 45**4 ways, one after the other, among the 100 letters of a long module name.
_LONG = 45
_MOST = 1e7  # ways through an expression: those four with some choices beside them, tried in a tenth of a second
_LONGEST = 2000
_MANY = 20_000  # expressions, of which each is tried on each module's name: more than models have modules to name so
_ALTOGETHER = 2**21  # letters in all of them


def refuse_slow_patterns(options: Mapping[str, Any]) -> None:
    """Refuses expressions on which Python's ``re`` may go through more ways than there is time for.

    Args:
        options: a method's. Texts in entries whose name has ``modules`` or ``pattern`` in it are expressions, as are
            the keys of dictionaries there; lists hold names.

    Raises:
        ValueError: if one repeats what can match in several ways, such as ``(a+)+`` or ``(a|b)*``, has too many parts
            that can, or is no expression.
    """
    patterns = list(_patterns(options))
    if len(patterns) > _MANY or sum(len(p) for _, p in patterns) > _ALTOGETHER:
        raise ValueError(f"its {len(patterns):,} expressions take longer to match than anybody waits")
    for option, pattern in patterns:
        try:
            ways = _ways(re._parser.parse(pattern)) if len(pattern) <= _LONGEST else math.inf  # type: ignore[attr-defined]
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{option}: {pattern[:80]!r} is no regular expression: {error}") from error
        if ways > _MOST:
            raise ValueError(
                f"{option}: {pattern[:80]!r} may take longer to match than anybody waits; write it without repeats and "
                "choices within repeats, and with four parts such as '.*' at most"
            )


def _patterns(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for option, value in options.items():
        if isinstance(value, Mapping) and "pattern" not in option:
            yield from _patterns({str(k): v for k, v in value.items()})
        elif "modules" in option or "pattern" in option:
            texts = list(value) if isinstance(value, Mapping) else [value]
            yield from ((option, t) for t in texts if isinstance(t, str))


def _ways(parts: Iterable[Any]) -> float:
    """How many ways through a sequence a failing match may try, at most."""
    return math.prod(_ways_of(str(operation), argument) for operation, argument in parts)


def _ways_of(operation: str, argument: Any) -> float:
    if operation.endswith("REPEAT"):
        least, most, inner = argument
        return _ways_to_repeat(int(least), int(most), _ways(inner))
    if operation == "BRANCH":
        return _ways_to_choose([list(branch) for branch in argument[1]])
    if operation == "GROUPREF_EXISTS":
        return sum(_ways(branch) for branch in argument[1:] if branch is not None)
    if operation in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(argument[-1])
    return _ways(argument) if operation == "ATOMIC_GROUP" else 1


def _ways_to_repeat(least: int, most: int, each: float) -> float:
    return min(most - least + 1, _LONG) * (math.inf if each > 1 and most > 30 else each ** min(most, 30))


def _ways_to_choose(branches: list[list[Any]]) -> float:
    """Of fixed texts a name has one, and those that it begins with; of others any."""
    if any(str(operation) != "LITERAL" for branch in branches for operation, _ in branch):
        return sum(map(_ways, branches))
    return max(sum(long[: len(short)] == short for short in branches) for long in branches)
