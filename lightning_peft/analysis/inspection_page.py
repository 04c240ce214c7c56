"""What an adapter holds and changes, as one HTML page with a heat map that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_peft.analysis.change import Change
from lightning_peft.analysis.inspection import Inspection, kinds, shared_prefix
from lightning_peft.analysis.inspection_report import about, sparks, summary
from lightning_peft.formats.writing import write_json, written_file

PAGE = "inspect.html"
NUMBERS = "inspect.json"


class Cell(NamedTuple):
    """One change in a heat map.

    Attributes:
        shown: its number.
        strength: from 0 to 1, the map's largest.
        said: what it is, in full.
    """

    shown: str
    strength: float
    said: str


@dataclass(frozen=True)
class HeatMap:
    """Layers by kinds of modules.

    Attributes:
        prefix: what the names of all layers begin with.
        columns: the kinds.
        rows: a layer's name without the prefix, and what lies in each column; None where nothing does.
        outside: modules outside of layers, such as embeddings.
        largest: what the strongest colour stands for.
    """

    prefix: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    outside: tuple[tuple[str, Cell], ...]
    largest: str


def refuse_existing(folder: Path) -> None:
    """Refuses a folder that has such a page already.

    Args:
        folder: the folder; it need not exist.

    Raises:
        FileExistsError: if it has, or is a file.
    """
    there = [p for p in (folder / PAGE, folder / NUMBERS) if p.exists()] or ([folder] if folder.is_file() else [])
    if there:
        raise FileExistsError(f"{there[0]} exists; choose another folder with to=..., or move it away")


def write_inspection_page(found: Inspection, folder: str | Path) -> Path:
    """Writes ``inspect.html`` for people and ``inspect.json`` for other programs.

    Args:
        found: the inspection.
        folder: where to; it is made if it does not exist.

    Returns:
        The page.

    Raises:
        FileExistsError: if one of them is there already.
    """
    import jinja2

    folder = Path(folder)
    refuse_existing(folder)
    loader = jinja2.PackageLoader("lightning_peft.analysis", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["sparks"] = sparks
    page = environment.get_template("inspect.html.j2").render(
        found=found, about=about(found), summary=summary(found), heat=heat_map(found.shown)
    )
    folder.mkdir(parents=True, exist_ok=True)
    with written_file(folder / PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8")
    write_json(folder / NUMBERS, json.loads(json.dumps(found.to_dict())))
    return folder / PAGE


def heat_map(changes: Sequence[Change]) -> HeatMap | None:
    """Layers by kinds of modules, as strong as the change relative to the weight, or without weights its norm.

    Args:
        changes: the changes; vectors, such as biases, are left out where there are matrices.

    Returns:
        The map; None where nothing is in layers.
    """
    matrices = [c for c in changes if len(c.shape) > 1] or list(changes)
    inside = [c for c in matrices if c.layer]
    if not inside:
        return None
    is_relative = all(c.relative is not None for c in inside)
    shown = [c for c in matrices if c.relative is not None] if is_relative else matrices  # none of a weight of zeros
    strength = {c.name: (c.relative or 0.0) if is_relative else c.norm for c in shown}
    most = max(strength.values()) or 1.0
    layers = list(dict.fromkeys(c.layer for c in inside))
    columns = tuple(kind.name for kind in kinds(inside))
    cells = {(c.layer, c.kind): c for c in inside}
    prefix = shared_prefix(layers)

    def cell(change: Change) -> Cell:
        said = f"{100 * strength[change.name]:.2g}" if is_relative else f"{change.norm:.2g}"
        return Cell(said, strength[change.name] / most, f"{change.name}: rank {change.rank} of {change.capacity}")

    return HeatMap(
        prefix=prefix,
        columns=columns,
        rows=tuple(
            (layer.removeprefix(prefix), tuple(cell(c) if (c := cells.get((layer, k))) else None for k in columns))
            for layer in layers
        ),
        outside=tuple((c.name, cell(c)) for c in shown if not c.layer),
        largest=f"{most:.2%} of the weight's norm" if is_relative else f"a norm of {most:.3g}",
    )
