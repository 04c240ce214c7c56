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
        options: the options that they are the values of, in their order.
        several: whether there is one option, a list, which takes any number of words.

    Example:
        >>> BareWords(("run",)).as_overrides(["outputs/a b", "seed=1"])
        ['run="outputs/a b"', 'seed=1']
        >>> BareWords(("a", "b")).as_overrides(["one", "two"])
        ['a="one"', 'b="two"']
        >>> BareWords(("runs",), several=True).as_overrides(["one", "two"])
        ['runs=["one","two"]']
    """

    options: tuple[str, ...]
    several: bool = False

    def as_overrides(self, arguments: Sequence[str]) -> list[str]:
        """The same arguments, words that stand alone as the override that they stand for.

        Args:
            arguments: a command's, without flags. One that is a path of something that exists is a word, though it may
                have a ``=`` in it, as the folders of a sweep have.

        Raises:
            ValueError: if there are more words than options that they can be, or an option is given as well.
        """
        words = [a for a in arguments if is_word(a) or os.path.exists(a)]
        others = [a for a in arguments if a not in words]
        shown = " and ".join(map(repr, words))
        if len(words) > len(self.options) and not self.several:
            names = f"one {self.options[0]} is" if len(self.options) == 1 else f"{' and '.join(self.options)} are"
            raise ValueError(f"{names} expected, but got {shown}")
        named = {a.partition("=")[0].lstrip("+"): a for a in others}
        again = next((named[option] for option in self.options[: len(words)] if option in named), None)
        if again is not None:
            option = again.partition("=")[0].lstrip("+")
            raise ValueError(f"{option} is given twice: {shown} and {again!r}; leave one of them out")
        if self.several and words:
            return [f"{self.options[0]}=[{','.join(map(quoted, words))}]", *others]
        return [*(f"{option}={quoted(word)}" for option, word in zip(self.options, words, strict=False)), *others]
