"""Errors that help: all problems at once, and the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SHOWN = 8  # names that nobody knows, of which an error tells
_LONGEST_NAME = 200  # beyond which nobody meant a name that is known, and comparing takes its time


def nearest(name: str, known: Iterable[str], count: int = 3, *, loosely: bool = True) -> str:
    """The end of an error's sentence about an unknown name.

    Args:
        name: what was given.
        known: what would have been right.
        count: how many near names to list.
        loosely: whether a distant likeness counts where there is no close one, as it does in long names of modules.

    Returns:
        ``"; did you mean 'a' or 'b'?"``, or the first known names where none is near.
    """
    names = sorted(set(known))
    near = _close(name, names, count, 0.6)
    if not near and loosely:
        tail = name.rpartition(".")[2]
        ends = {n.rpartition(".")[2] for n in names}
        near = _close(tail, sorted(ends), count, 0.4)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else ""


def nearest_path(path: Path) -> str:
    """The end of an error's sentence about a file or a folder that is not there.

    Args:
        path: what was given.

    Returns:
        ``"; did you mean 'runs/a'?"``, or ``""`` where no path is there that differs in one such name.
    """
    found: list[Path] = []
    with suppress(OSError):  # of folders that may not be read, and names that are too long for any
        missing = next((p for p in [*reversed(path.parents), path] if not p.exists()), None)
        if missing is not None:
            near = _close(missing.name, sorted({p.name for p in missing.parent.iterdir()} - {missing.name}), 3, 0.6)
            found = [p for name in near if (p := missing.with_name(name) / path.relative_to(missing)).exists()]
    return "; did you mean " + " or ".join(repr(str(p)) for p in found) + "?" if found else ""


def and_more(count: int) -> str:
    """The end of a list of which only the first are told.

    Args:
        count: how many are left; with none there is nothing to say.
    """
    return f"; and {count:,} more" if count > 0 else ""


def _close(name: str, known: list[str], count: int, cutoff: float) -> list[str]:
    """The nearest names, best first, without those that are clearly further off than the best."""
    if len(name) > _LONGEST_NAME:
        return []
    found = difflib.get_close_matches(name, known, n=count, cutoff=cutoff)
    ratios = [difflib.SequenceMatcher(None, f, name).ratio() for f in found]
    return [f for f, ratio in zip(found, ratios, strict=True) if ratio > ratios[0] - 0.1]


def unknown_names(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Names that nobody knows, each with the nearest that is known; of many the first few.

    Args:
        unknown: the names as given.
        known: all that there are.
    """
    known = list(known)
    shown = ", ".join(f"{name!r}{nearest(name, known)}" for name in unknown[:_SHOWN])
    return shown + and_more(len(unknown) - _SHOWN)


def shortened(text: str, most: int = 1000) -> str:
    """A text that may be as long as the file that it is from, cut to what a person reads of it.

    Args:
        text: any text.
        most: how many characters stay.
    """
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters more)"


def an(name: str) -> str:
    """The name of a class with the article that is spoken before it.

    Args:
        name: the name, such as ``"Embedding"``, ``"RMSNorm"`` or ``"Linear"``.

    Returns:
        ``"an Embedding"``, ``"an RMSNorm"``, ``"a Linear"``.
    """
    # the second half: letters that are read one by one, whose names begin with a vowel
    is_an = re.match(r"(?![Ee]u)[AEIOaeio]|[FHLMNRSX][A-Z]", name) is not None
    return f"{'an' if is_an else 'a'} {name}"


def raise_problems(subject: str, problems: Iterable[str | None]) -> None:
    """Raises one error for all that is wrong.

    Args:
        subject: what was being made.
        problems: a sentence for each problem; None and empty ones are passed over.

    Raises:
        ValueError: if there is a problem.
    """
    found = [p for p in problems if p]
    if found:
        raise ValueError(f"{subject}: " + "; ".join(found))


_NO_OPTIONS = frozenset(
    (
        "peft_type",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
    )
)


def refuse_unknown(method: str, config: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuses a foreign adapter configuration that asks for more than is understood here.

    Args:
        method: the method's name, for the error.
        config: an ``adapter_config.json``.
        known: the fields that are understood; others may be there as long as they are empty or false.

    Raises:
        ValueError: if another field has a value.
    """
    understood = {*known, *_NO_OPTIONS}
    extra = sorted(k for k, v in config.items() if k not in understood and v)
    if extra:
        shown = ", ".join(f"{k}={config[k]!r}" for k in extra)
        raise ValueError(f"{method}: this adapter uses {shown}, which is not supported here")
