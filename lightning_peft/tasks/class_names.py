"""Names of classes: read off labels that are words or numbers, learnt from rows, and turned into numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lightning_peft.core.problems import nearest

T = TypeVar("T")


def class_name(value: Any) -> str:
    """The name that a row's label stands for.

    Args:
        value: a word, a whole number (3.0 too, as tables with gaps hold it), or a truth value.

    Raises:
        ValueError: if it is something else or empty; the sentence goes on behind the row's place.
    """
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, float) or not isinstance(value, str | int):
        raise ValueError(f"has the label {value!r}, but one name or whole number is expected")
    if value == "":
        raise ValueError("has an empty label")
    return str(value)


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once: numbers by their size, then words by the alphabet."""
    return sorted(set(names), key=lambda n: (not _is_number(n), int(n) if _is_number(n) else 0, n))


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def readable(values: Iterable[Any], read: Callable[[Any], T]) -> list[T]:
    """What can be read of some values; rows that cannot be used are named later, with their places.

    Args:
        values: of the training rows.
        read: raises a ValueError where a value cannot be used.

    Raises:
        ValueError: if no value at all can be used.
    """
    found: list[T] = []
    first: ValueError | None = None
    for value in values:
        try:
            found.append(read(value))
        except ValueError as error:
            first = first or error
    if first is not None and not found:
        raise ValueError(f"no training row can be used: the first {first}") from first
    return found


class ClassNumbers:
    """Turns labels into the classes' numbers.

    Args:
        names: the classes in the order of their numbers.
        by_number: take a number for the class at that place too. Where names are numbers themselves it never is.
    """

    def __init__(self, names: Sequence[str], *, by_number: bool) -> None:
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        if by_number and not any(map(_is_number, names)):
            self._numbers |= {str(number): number for number in range(len(names))}

    def __call__(self, label: Any) -> int:
        """The number of a label's class.

        Args:
            label: a row's.

        Raises:
            ValueError: if there is no such class; the sentence goes on behind the row's place.
        """
        name = class_name(label)
        if name not in self._numbers:
            raise ValueError(f"has the label {name!r}, which training does not know{nearest(name, self.names)}")
        return self._numbers[name]

    def head(self) -> dict[str, Any]:
        """The entries of a model's config that give its head an output a class, with the class's name."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }
