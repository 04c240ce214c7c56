"""What a model will see of its data, as one HTML page with plots that needs nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_peft.analysis.data_summary import DataSummary, percent
from lightning_peft.analysis.plots import bars_svg, histogram_svg
from lightning_peft.formats.writing import write_json, written_file

PAGE = "data.html"
NUMBERS = "data.json"
_LABELS = 40  # bars that a plot has room for


def write_data_page(summary: DataSummary, folder: str | Path) -> Path:
    """Writes ``data.html`` for people and ``data.json`` for other programs, in place of those of an earlier call.

    Args:
        summary: the summary.
        folder: where to.

    Returns:
        The page.
    """
    import jinja2

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loader = jinja2.PackageLoader("lightning_peft.analysis", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["grouped"] = lambda n: f"{n:,}" if isinstance(n, int) else f"{n:,.6g}"
    environment.globals["percent"] = percent
    page = environment.get_template("data.html.j2").render(data=summary, plots=_plots(summary))
    with written_file(folder / PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8")
    write_json(folder / NUMBERS, json.loads(json.dumps(summary.to_dict())))
    return folder / PAGE


def _plots(summary: DataSummary) -> list[dict[str, Any]]:
    """Titles with their drawings."""
    splits = summary.splits
    drawn: list[dict[str, Any]] = []

    for name in dict.fromkeys(name for split in splits.values() for name in split.spreads):
        found = {split: s.spreads[name] for split, s in splits.items() if name in s.spreads}
        drawn.append({"title": name.capitalize(), "svg": histogram_svg(found)})
    labels = {split: s.labels for split, s in splits.items() if s.labels}
    if labels:
        every = list(dict.fromkeys(label for counts in labels.values() for label in counts))
        first = every[:_LABELS]
        shares = {split: [counts.get(n, 0) / sum(counts.values()) for n in first] for split, counts in labels.items()}
        left = f", the first {_LABELS} of {len(every)}" if len(every) > _LABELS else ""
        drawn.append({"title": f"Labels{left}", "svg": bars_svg(first, shares)})
    return drawn
