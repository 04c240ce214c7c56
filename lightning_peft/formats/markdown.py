"""Words of others in Markdown: a label, a folder's name or an option must not become a link, a heading or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def prose(text: str) -> str:
    """A text on one line in which nothing is a mark of Markdown or HTML.

    Args:
        text: any text.
    """
    # an underscore within a word marks nothing, and names are full of them
    marked = re.sub(r"([\\`*\[\]<>|#!~&])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", one_line(text))
    # hubs turn addresses into links, which these breaks keep from happening
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", "\\1\u200b", marked)


def code(text: str) -> str:
    """A text as it stands, in a span of code that it cannot end.

    Args:
        text: any text; in a table's cell, what `prose` gives for a bar is understood too.
    """
    line = one_line(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    marks = "`" * (longest + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{marks}{space}{line}{space}{marks}"


def block(*lines: str, language: str = "python") -> str:
    """Lines of code in a fence that none of them can end.

    Args:
        *lines: the code; a line may have ends of lines in it.
        language: what it is.
    """
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    """A table.

    Args:
        heads: of the columns, in Markdown.
        rows: of cells, in Markdown.
        sides: ``l`` or ``r`` for each column.
    """
    rules = ["---:" if side == "r" else "---" for side in sides]
    lines = [heads, rules, *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Without what would end a cell, even within code; what is marked as plain already stays so."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", one_line(text))


def one_line(text: str) -> str:
    """A text without ends of lines and other characters that are not seen, such as those that turn its direction.

    Args:
        text: any text.
    """
    return " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in str(text)).split())
