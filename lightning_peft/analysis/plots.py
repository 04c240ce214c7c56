"""Drawings that stand in a page of either brightness: SVG whose text has the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.analysis.data_summary import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # becomes the page's own colour
_COLOURS = ("#3b82c4", "#e08a2e", "#4fa36b")  # of middling brightness: seen on white and on black


def histogram_svg(spreads: Mapping[str, Spread]) -> str:
    """A histogram for each split, below one another; where numbers are cut, a line.

    Args:
        spreads: split to numbers of one kind.
    """
    import numpy as np

    with page_style():
        figure = figure_of(6.4, 0.5 + 1.15 * len(spreads))
        axes = figure.subplots(len(spreads), 1, sharex=True, squeeze=False)[:, 0]
        for place, colour, (name, spread) in zip(axes, _COLOURS, spreads.items(), strict=False):
            edges = np.array(spread.edges if len(spread.edges) > 1 else [spread.edges[0], spread.edges[0] + 1])
            place.bar(edges[:-1], spread.counts, np.diff(edges) * 0.94, align="edge", color=colour)
            place.axvline(spread.median, color=INK, linewidth=1)
            place.set_ylabel(name)
            if spread.limit is not None and spread.largest >= spread.limit:
                place.axvline(spread.limit + 1, color=INK, linewidth=1, linestyle=":")
        axes[-1].set_xlabel(f"{next(iter(spreads.values())).unit or 'value'} (line: median)")
        return page_svg(figure)


def bars_svg(names: Sequence[str], shares: Mapping[str, Sequence[float]]) -> str:
    """A horizontal bar for each name and split.

    Args:
        names: from top to bottom.
        shares: split to a share for each name.
    """
    import numpy as np

    with page_style():
        figure = figure_of(6.4, 0.7 + 0.16 * len(names) * (1 + 0.6 * len(shares)))
        place = figure.subplots()
        height, rows = 0.8 / len(shares), np.arange(len(names))
        for number, (colour, (split, values)) in enumerate(zip(_COLOURS, shares.items(), strict=False)):
            where = rows - 0.4 + height * (number + 0.5)
            place.barh(where, [100 * v for v in values], height * 0.9, color=colour, label=split)
        place.set_yticks(rows, [n if len(n) <= 30 else f"{n[:28]}..." for n in names])
        place.invert_yaxis()
        place.margins(y=0.01)
        place.set_xlabel("% of rows")
        place.legend(frameon=False, labelcolor=INK)
        return page_svg(figure)


def page_style() -> Any:
    """Matplotlib's settings for a drawing, as a context."""
    import matplotlib as mpl

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return mpl.rc_context(
        {
            **dict.fromkeys(inks, INK),
            "svg.fonttype": "none",  # letters, in the page's font
            "svg.hashsalt": "lightning_peft",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            # a label such as "$x$" is no formula
            "text.parse_math": False,
        }
    )


def figure_of(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: in inches.
        height: in inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def page_svg(figure: Figure) -> str:
    """The figure as an SVG element whose lines and letters have the colour and the font of the page.

    Args:
        figure: drawn within `page_style`.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", drawn)
