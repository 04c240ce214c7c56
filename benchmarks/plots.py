"""The picture of what a step costs as things grow, out of what `cost_against_size.py` wrote."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

INK, PALE, GRID = "#24292f", "#8c959f", "#d0d7de"
TIME, KEPT, MIXED = "#3b82c4", "#e08a2e", "#4fa36b"
PANELS = {
    "rank": ("rank of LoRA", "linear"),
    "layers": ("layers", "log"),
    "tokens": ("tokens", "log"),
    "adapters": ("adapters of a model", "linear"),
}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


def draw(found: Mapping[str, Any]) -> bytes:
    """Time and kept bytes over those of the smallest size.

    Args:
        found: what the benchmark wrote.

    Returns:
        A PNG, 1480 pixels wide, made to be read at half of that.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 5.8), dpi=200, layout="constrained", facecolor="white")
        for place, (name, (title, scale)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            _panel(place, found[name])
            if name == "adapters":
                _line(place, found["adapters in a batch"], MIXED, "time of a forward whose examples have one each")
            place.set_title(title, fontsize=10, loc="left")
            place.set_xscale("log", base=2)
            sizes = [int(size) for size in found[name]]
            place.set_xticks(sizes, [str(size) for size in sizes])
            place.set_yscale(scale, **({"base": 2} if scale == "log" else {}))
            if scale == "linear":
                place.set_ylim(bottom=0)
            else:
                place.yaxis.set_major_formatter("{x:g}")
            place.grid(color=GRID, linewidth=0.6)
            place.set_axisbelow(True)
        figure.supylabel("times that of the smallest size", fontsize=9)
        handles, labels = place.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return file.getvalue()


def _panel(place: Any, rows: Mapping[str, Any]) -> None:
    sizes = [int(size) for size in rows]
    expected = [row["by_arithmetic"] for row in rows.values()]
    place.plot(sizes, expected, color=PALE, linewidth=1.2, linestyle="--", label="time of a step by arithmetic")
    least = rows[str(sizes[0])]["kept_mib"]
    kept = [row["kept_mib"] / least for row in rows.values()]
    place.plot(
        sizes, kept, color=KEPT, linewidth=1.5, marker="s", markersize=3, label="bytes kept for the backward pass"
    )
    _line(place, rows, TIME, "time of a step with one adapter (least to most)")


def _line(place: Any, rows: Mapping[str, Any], colour: str, label: str) -> None:
    sizes = [int(size) for size in rows]
    least, most = zip(*(row["spread"] for row in rows.values()), strict=True)
    place.fill_between(sizes, least, most, color=colour, alpha=0.18, linewidth=0)
    times = [row["over_smallest"] for row in rows.values()]
    place.plot(sizes, times, color=colour, linewidth=1.5, marker="o", markersize=3.5, label=label)
