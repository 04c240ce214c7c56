"""What a search for a learning rate saw, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

_INK, _PALE, _CURVE, _FOUND = "#24292f", "#8c959f", "#3b82c4", "#e08a2e"


def rates_png(rates: Sequence[float], losses: Sequence[float], found: float | None, own: float) -> bytes:
    """The loss over the rates that were tried, with the one that was found and the method's own.

    Args:
        rates: one a step, rising.
        losses: the smoothed loss after each step; those that are not finite are left out of the line.
        found: the rate that was found; None where none was.
        own: the method's own rate.

    Returns:
        A PNG, 1280 pixels wide, made to be read at half of that.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "axes.edgecolor": _PALE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 2.7), dpi=200, layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color=_CURVE)
        axes.axvline(own, color=_PALE, linestyle=":", label=f"the method's own, {own:g}")
        if found is not None:
            axes.axvline(found, color=_FOUND, label=f"found, {found:g}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
