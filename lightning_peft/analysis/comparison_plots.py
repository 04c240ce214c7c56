"""The drawings of a report that compares runs; each method's marks are one group, by which a page hides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from lightning_peft.analysis.comparison import Comparison
from lightning_peft.analysis.comparison_table import lost_in
from lightning_peft.analysis.plots import INK, figure_of
from lightning_peft.analysis.settings import LONG, Setting, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without black and yellow, which one of the two backgrounds swallows
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_MARKS = ("o", "s", "^", "D", "v", "P")
_LETTERS = 8.0  # points
_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""
_GREY = "#8a8f98"
_DASHES = ("-", "--", ":", "-.")
_WHISKERS = "whiskers: standard deviation over the seeds"
_BESIDE = 28  # characters of a legend that stands beside its drawing; longer ones stand below


def figures(comparison: Comparison) -> dict[str, Figure]:
    """All drawings that there are numbers for, by the names that their files have.

    Args:
        comparison: what is drawn.
    """
    metric = comparison.monitor
    gigabyte = max((s.peak_bytes or 0 for s in comparison.settings), default=0) >= 1e9
    drawn: dict[str, Figure | None] = {
        "metric_against_memory": _costs(
            comparison,
            lambda s: None if s.peak_bytes is None else s.peak_bytes / (1e9 if gigabyte else 1e6),
            f"memory at the peak of a step ({'GB' if gigabyte else 'MB'})",
            comparison.by_memory,
        ),
        "metric_against_time": _costs(
            comparison,
            lambda s: None if s.step_seconds is None else s.step_seconds * 1000,
            "time of a step (ms)",
            comparison.by_time,
        ),
        "metric_against_parameters": _costs(comparison, lambda s: s.trained, "trained parameters", frozenset()),
        "learning_curves": _curves(comparison, metric, [[run.curve for run in s.runs] for s in comparison.settings]),
        "training_loss": _curves(comparison, "train/loss", [[r.losses for r in s.runs] for s in comparison.settings]),
        "forgetting": _forgetting(comparison),
        "drift": _curves(
            comparison,
            "drift from the base (1 - CKA)",
            [[tuple(enumerate(run.layers.values())) for run in s.runs] for s in comparison.settings],
            across="layer",
        ),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def group_of(comparison: Comparison, setting: Setting) -> str:
    """The word by which a page finds a setting's marks: its place in the table.

    Args:
        comparison: the report.
        setting: one of its settings.
    """
    return f"method-{comparison.settings.index(setting)}"


def coloured(comparison: Comparison) -> list[str]:
    """The settings that have a colour of their own: those on a front and the best, as many as can be told apart.

    Args:
        comparison: the report.
    """
    if len(comparison.settings) <= len(COLOURS):
        return [s.name for s in comparison.settings]
    fronts = comparison.by_memory | comparison.by_time
    first = [comparison.recommended, comparison.settings[0].name]
    ordered = dict.fromkeys([*first, *(s.name for s in comparison.settings if s.name in fronts)])
    return list(ordered)[: len(COLOURS)]


def _look(comparison: Comparison, setting: Setting) -> tuple[str, str, str]:
    """Colour, mark and dashes."""
    own = coloured(comparison)
    if setting.name not in own:
        return _GREY, "x" if setting.pruned else ".", "-"
    number = own.index(setting.name)
    return COLOURS[number], "x" if setting.pruned else _MARKS[number], _DASHES[number % len(_DASHES)]


def _costs(
    comparison: Comparison, cost: Callable[[Setting], float | None], label: str, front: frozenset[str]
) -> Figure | None:
    """The metric against a cost, with its spread over the seeds, and the front joined."""
    from matplotlib.ticker import FuncFormatter

    points = [(s, value) for s in comparison.settings if (value := cost(s)) is not None]
    if len(points) < 2:
        return None
    figure = figure_of(7.2, 4.0)
    place = figure.subplots()
    values = [value for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        place.set_xscale("log")
    place.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}" if v < 1e5 else f"{v:,.0f}"))
    for setting, value in points:
        colour, mark, _ = _look(comparison, setting)
        bars = place.errorbar(
            [value], [setting.score], yerr=[setting.spread or 0], color=colour, marker=mark, markersize=7, capsize=2
        )
        for part in (bars.lines[0], *bars.lines[1], *bars.lines[2]):
            part.set_gid(group_of(comparison, setting))
    joined = sorted((value, s.score) for s, value in points if s.name in front)
    if len(joined) > 1:
        place.plot(*zip(*joined, strict=True), color=INK, linewidth=0.8, alpha=0.5, zorder=0, linestyle="--")
    place.set_xlabel(label)
    place.set_ylabel(comparison.monitor)
    told = [
        _WHISKERS if any(s.spread for s, _ in points) else "",
        "dashes: the Pareto front" if len(joined) > 1 else "",
        "crosses: pruned" if any(s.pruned for s, _ in points) else "",
    ]
    _explain(place, told)
    place.margins(x=0.12, y=0.12)
    figure.draw_without_rendering()  # the axes have their place only then
    _name(place, comparison, points)
    return figure


def _explain(place: Axes, told: Sequence[str]) -> None:
    """What the marks of a drawing mean, above it."""
    place.set_title("; ".join(filter(None, told)), fontsize=_LETTERS, loc="left", color=INK)


def _name(place: Axes, comparison: Comparison, points: Sequence[tuple[Setting, float]]) -> None:
    """Names beside the points that have a colour, each on the side where it covers least."""
    own = coloured(comparison)
    inches = 72 / place.figure.dpi
    where = {s.name: place.transData.transform((value, s.score)) * inches for s, value in points}
    frame = [inches * edge for edge in place.bbox.extents]
    taken: list[_Box] = []
    for setting, value in sorted(points, key=lambda point: -point[0].score):
        if setting.name not in own:
            continue
        shown = _shown(comparison, setting)
        wide = 0.6 * _LETTERS * len(shown)

        def cost(side: tuple[float, float], setting: Setting = setting, wide: float = wide) -> int:
            left, low = where[setting.name] + side
            box = (left, low, left + wide, low + _LETTERS)
            inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
            covers = sum(_within(point, box) for name, point in where.items() if name != setting.name)
            return covers + 2 * sum(_meet(box, other) for other in taken) + (0 if inside else 3)

        side = min(((6.0, 4.0), (6.0, -11.0), (-6 - wide, 4.0), (-6 - wide, -11.0)), key=cost)
        left, low = where[setting.name] + side
        taken.append((left, low, left + wide, low + _LETTERS))
        place.annotate(
            shown,
            (value, setting.score),
            xytext=side,
            textcoords="offset points",
            fontsize=_LETTERS,
            gid=group_of(comparison, setting),
        )


def _shown(comparison: Comparison, setting: Setting) -> str:
    number = numbers(comparison.settings).get(setting.name)
    if number is not None:
        return f"run {number}"
    return setting.name if len(setting.name) <= LONG else f"{setting.name[: LONG - 2]}..."


def _within(point: Any, box: _Box) -> bool:
    return bool(box[0] - 3 <= point[0] <= box[2] + 3 and box[1] - 3 <= point[1] <= box[3] + 3)


def _meet(first: _Box, second: _Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _curves(
    comparison: Comparison, label: str, lines: Sequence[Sequence[Sequence[tuple[int, float]]]], across: str = "step"
) -> Figure | None:
    """A curve for each setting: the mean over its seeds, and where the seeds lie."""
    if not any(len(curve) > 1 for curves in lines for curve in curves):
        return None
    from matplotlib.ticker import MaxNLocator

    own = coloured(comparison)
    labels = [_in_a_legend(comparison, s) for s in comparison.settings if s.name in own]
    below = max(map(len, labels)) > _BESIDE
    figure = figure_of(7.2, 3.8 + (0.17 * len(labels) if below else 0))
    place = figure.subplots()
    banded = False
    for setting, curves in zip(comparison.settings, lines, strict=True):
        steps, middle, low, high = _over_seeds(curves)
        if not steps:
            continue
        colour, mark, dashes = _look(comparison, setting)
        few = len(steps) <= 20
        (line,) = place.plot(
            steps,
            middle,
            color=colour,
            linestyle=dashes,
            linewidth=1.6 if setting.name in own else 0.7,
            marker=mark if few else None,
            markersize=4,
            label=_in_a_legend(comparison, setting) if setting.name in own else "_",
            zorder=3 if setting.name in own else 1,
        )
        line.set_gid(group_of(comparison, setting))
        if setting.name in own and few and any(h > b for b, h in zip(low, high, strict=True)):
            band: Any = place.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            band.set_gid(group_of(comparison, setting))
            banded = True
    place.set_xlabel(across)
    place.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    place.set_ylabel(label)
    several = any(len(curves) > 1 for curves in lines)
    _explain(
        place, ["lines: means over the seeds" if several else "", "bands: from the least to the most" if banded else ""]
    )
    where = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.16) if below else (1.0, 1.0)}
    place.legend(frameon=False, fontsize=_LETTERS, labelcolor=INK, **where)
    return figure


def _in_a_legend(comparison: Comparison, setting: Setting) -> str:
    number = numbers(comparison.settings).get(setting.name)
    return setting.name if number is None else f"run {number}: {setting.name}"


def _over_seeds(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all seeds have, and there the mean, the least and the most."""
    known = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in known))) if known else []
    values = [[curve[step] for curve in known] for step in steps]
    return steps, [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _forgetting(comparison: Comparison) -> Figure | None:
    """What each setting lost of the base's ability, as bars."""
    found = [(s, value) for s in comparison.settings if (value := s.forgetting) is not None]
    if not found:
        return None
    figure = figure_of(7.2, 0.9 + 0.32 * len(found))
    place = figure.subplots()
    for row, (setting, value) in enumerate(found):
        colour, spread = _look(comparison, setting)[0], setting.forgetting_spread
        (bar,) = place.barh([row], [value], 0.7, color=colour, xerr=spread, capsize=2, ecolor=INK)
        bar.set_gid(group_of(comparison, setting))
    place.set_yticks(range(len(found)), [_shown(comparison, s) for s, _ in found])
    place.invert_yaxis()
    place.set_xlabel(lost_in(comparison.settings))
    _explain(place, [_WHISKERS if any(s.forgetting_spread for s, _ in found) else ""])
    return figure
