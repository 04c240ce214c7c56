"""Words of a command line that stand alone, such as a folder behind ``doctor``: the value of one of its options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_peft.analysis.called import quoted


def is_word(argument: str) -> bool:
    """Whether an argument is no flag and no override.

    Args:
        argument: as it was typed.
    """
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


@dataclass(frozen=True)
class BareWords:
    """What a command makes of words that stand alone.

    Attributes:
        option: the option that they are the value of.
        several: whether it is a list, which takes any number of them.

    Example:
        >>> BareWords("run").as_overrides(["outputs/a b", "seed=1"])
        ['run="outputs/a b"', 'seed=1']
        >>> BareWords("runs", several=True).as_overrides(["one", "two"])
        ['runs=["one","two"]']
    """

    option: str
    several: bool = False

    def as_overrides(self, arguments: Sequence[str]) -> list[str]:
        """The same arguments, words that stand alone as the override that they stand for.

        Args:
            arguments: a command's, without flags. One that is a path of something that exists is a word, though it may
                have a ``=`` in it, as the folders of a sweep have.

        Raises:
            ValueError: if there are several words and the option takes one, or the option is given as well.
        """
        words = [a for a in arguments if is_word(a) or os.path.exists(a)]
        others = [a for a in arguments if a not in words]
        if not words:
            return others
        shown = " and ".join(map(repr, words))
        if len(words) > 1 and not self.several:
            raise ValueError(f"one {self.option} is expected, but got {shown}")
        again = next((a for a in others if a.partition("=")[0].lstrip("+") == self.option), None)
        if again is not None:
            raise ValueError(f"{self.option} is given twice: {shown} and {again!r}; leave one of them out")
        values = ",".join(map(quoted, words))
        return [f"{self.option}={f'[{values}]' if self.several else values}", *others]
