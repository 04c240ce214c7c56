"""The README's table of methods, out of what `embedded_accuracy.py` measured.

python benchmarks/accuracy_table.py    # writes the table into README.md
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any, cast

from omegaconf import OmegaConf

from lightning_peft.methods.config import method_from_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PLACE = re.compile(r"(?<=<!-- accuracy -->\n).*?(?=<!-- end -->)", re.S)


def call(name: str) -> str:
    """The Python call that a method's YAML stands for, options at their defaults left out."""
    path = ROOT / "conf" / "method" / f"{name}.yaml"
    method: Any = method_from_config(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))
    own = [f for f in fields(method) if f.name != "learning_rate" and getattr(method, f.name) != f.default]
    plain = [f for f in own if not callable(f.default_factory) or getattr(method, f.name) != f.default_factory()]
    return f"{type(method).__name__}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in plain)})"


def accuracies(rows: list[dict[str, Any]]) -> str:
    """One run's accuracy, or the mean of several and their spread."""
    found = [row["accuracy"] for row in rows]
    if len(found) < 2:
        return "".join(f"{a:.3f}" for a in found)
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f}, {len(found)} seeds)"


def rows() -> dict[str, tuple[str, ...]]:
    """Each method's cells, the most accurate first: name, call, trained, checkpoint, accuracy, HF PEFT's accuracy."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (Path(__file__).parent / "results" / "embedded_accuracy.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["lr"] is None:  # of other rates than the method's own the pages about them tell
            runs[row["method"]].append(row)
    found = {}
    for name in sorted((n for n in runs if ":" not in n), key=lambda n: -mean(r["accuracy"] for r in runs[n])):
        first, theirs = runs[name][0], accuracies(runs.get(f"hf_peft:{name}", []))
        size = f"{first['checkpoint_bytes'] / 1e6:.1f} MB"
        cells = f"`{name}`", f"`{call(name)}`", f"{first['trainable']:,}", size, accuracies(runs[name]), theirs
        found[name] = cells
    return found


def table() -> str:
    """The table in Markdown, the most accurate method first."""
    lines = [
        "| `method=` | class | trained parameters | checkpoint | accuracy | HF PEFT's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in rows().values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(PLACE.sub(lambda _: table(), README.read_text()))
