"""The drawings of a search: how it went on, what each option does to the values, and which options matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.analysis.comparison_plots import COLOURS
from lightning_peft.analysis.plots import INK, figure_of
from lightning_peft.analysis.study import BEST, Search, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "search_history": "The search, trial by trial",
    "search_options": "Values against each option",
    "search_importances": "Options that tell good trials from the others",
}
_COLUMNS = 4
_GREY = "#8a8f98"


def search_figures(search: Search, groups: Mapping[int, str]) -> dict[str, Figure]:
    """All drawings that there are trials for, by the names that their files have.

    Args:
        search: what is drawn.
        groups: for a trial's number the word by which a page finds its marks.
    """
    if len(search.judged) < 2:
        return {}
    drawn = {"search_history": _history(search, groups), "search_options": _options(search, groups)}
    return drawn | ({"search_importances": _importances(search)} if search.importances else {})


def _history(search: Search, groups: Mapping[int, str]) -> Figure:
    """The values in the order of the trials, and the best one that a trial had reached by then."""
    count = len(search.objectives)
    figure = figure_of(7.2, 0.8 + 2.6 * count)
    for number, place in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
        for trial in search.judged:
            _mark(place, trial, trial.number, number, groups)
        best = max if search.larger[number] else min
        complete = [trial for trial in search.judged if trial.state == "complete"]
        reached = [best(t.values[number] for t in complete[: n + 1]) for n in range(len(complete))]
        where = [t.number for t in complete]
        if complete:  # the line goes on over trials that were pruned
            where, reached = [*where, search.judged[-1].number], [*reached, reached[-1]]
        place.step(where, reached, where="post", color=INK, linewidth=0.9, alpha=0.6, zorder=0)
        place.set_ylabel(search.objectives[number])
        place.xaxis.get_major_locator().set_params(integer=True)
    place.set_xlabel("trial (line: the best so far" + ("; crosses: pruned)" if _prunes(search) else ")"))
    return figure


def _options(search: Search, groups: Mapping[int, str]) -> Figure:
    """A scatter for each option and objective."""
    options = search.options
    columns = min(_COLUMNS, len(options))
    lines = -(-len(options) // columns)
    count = lines * len(search.objectives)
    figure = figure_of(max(3.6, 2.0 * columns), 0.5 + 2.3 * count)
    places = figure.subplots(count, columns, squeeze=False)
    for number, objective in enumerate(search.objectives):
        for spot, option in enumerate(options):
            place = places[number * lines + spot // columns, spot % columns]
            _scatter(place, search, option, number, groups)
            place.set_xlabel(option.lstrip("+").rpartition(".")[2])
            if spot % columns == 0:
                place.set_ylabel(objective)
            else:
                place.tick_params(labelleft=False)
        for spot in range(len(options), lines * columns):
            places[number * lines + spot // columns, spot % columns].set_axis_off()
    return figure


def _scatter(place: Axes, search: Search, option: str, number: int, groups: Mapping[int, str]) -> None:
    trials = [trial for trial in search.judged if option in trial.options]
    found = {trial.number: trial.options[option] for trial in trials}
    measured = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found.values())
    if measured and not _is_one_of_few(found):
        if option in search.on_a_log_scale:
            _log_scale(place)
        where: dict[int, Any] = found
    else:
        kinds = list(dict.fromkeys(found.values()))
        kinds = sorted(kinds) if measured else sorted(kinds, key=str)
        where = {trial: kinds.index(value) for trial, value in found.items()}
        place.set_xticks(range(len(kinds)), [_cut(str(kind)) for kind in kinds])
        place.set_xlim(-0.6, len(kinds) - 0.4)
    for trial in trials:
        _mark(place, trial, where[trial.number], number, groups)


def _log_scale(place: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    place.set_xscale("log")
    place.xaxis.set_major_locator(LogLocator(numticks=4))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    place.xaxis.set_minor_formatter(NullFormatter())


def _is_one_of_few(found: Mapping[int, Any]) -> bool:
    """Whether an option has few values, such as powers of two, which stand side by side at equal distances."""
    return len(set(found.values())) <= 8 < len(found) or all(isinstance(value, int) for value in found.values())


def _cut(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:10]}..."


def _mark(place: Axes, trial: Trial, where: Any, number: int, groups: Mapping[int, str]) -> None:
    pruned = trial.state == "pruned"
    colour, mark = (_GREY, "x") if pruned else (COLOURS[0], "o")
    (point,) = place.plot([where], [trial.values[number]], color=colour, marker=mark, markersize=5, alpha=0.85)
    if trial.number in groups:
        point.set_gid(groups[trial.number])


def _importances(search: Search) -> Figure:
    shares = search.importances
    figure = figure_of(7.2, 0.8 + 0.32 * len(shares))
    place = figure.subplots()
    place.barh(range(len(shares)), list(shares.values()), 0.7, color=COLOURS[0])
    place.set_yticks(range(len(shares)), [option.lstrip("+") for option in shares])
    place.invert_yaxis()
    complete = sum(trial.state == "complete" for trial in search.trials)
    place.set_xlabel(f"share in what tells the best {BEST:.0%} of {complete} trials from all (PED-ANOVA)")
    return figure


def _prunes(search: Search) -> bool:
    return any(trial.state == "pruned" for trial in search.judged)
