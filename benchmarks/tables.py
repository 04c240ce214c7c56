"""The page of figures, `docs/benchmarks.md`, and its picture, out of what the benchmarks wrote.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)


def read(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def rows(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; all columns but the first hold numbers."""
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)]) + "\n"


def spread(values: Sequence[float]) -> str:
    """From the least to the most."""
    return f"{values[0]:.2f} to {values[1]:.2f}"


def one_step() -> str:
    """Time and kept bytes of a step."""
    found = read("one_step")
    lines = [
        (f"{name}, {precision}", f"{r['over_floor']:.2f}", spread(r["over_floor_spread"]), r["kept_mib"])
        for precision in ("32-true", "bf16-mixed")
        for name, r in found[precision].items()
    ]
    return rows(("one step", "time over the floor", "spread", "kept, MiB"), lines)


def fine_tuning() -> str:
    """Supervised fine-tuning beside other tools."""
    found = read("supervised_fine_tuning")
    lines = []
    for name, r in found.items():
        if isinstance(r, dict):
            apart = r["largest_difference_of_losses"]
            losses = "" if apart is None or name == "ours" else f"{apart:.0e}"
            times = "" if name == "ours" else f"{r['times_as_fast']:.2f}"
            peaks = "" if name == "ours" else f"{r['of_its_peak']:.2f}"
            lines.append((name, f"{r['examples_per_second']:.2f}", r["peak_mib"], times, peaks, losses))
    head = ("", "examples a second", "peak, MiB", "ours is as fast, times", "ours takes of its peak", "losses apart by")
    return rows(head, lines)


def cached() -> str:
    """Epochs with the frozen layers' outputs at hand."""
    found = read("cached_layers")
    lines = [
        (
            n,
            f"{r['times_as_fast']:.2f}",
            spread(r["spread"]),
            r["by_arithmetic"] or "",
            f"{r['largest_difference_of_losses']:.0e}",
        )
        for n, r in found.items()
        if isinstance(r, dict)
    ]
    return rows(("trained", "as fast, times", "spread", "by arithmetic", "losses apart by"), lines)


def starting() -> str:
    """Injecting, saving and loading."""
    found = read("start_and_stop")
    lines = [
        (
            f"{what}, {found['linears']:,} linear layers",
            found[what]["ours"],
            found[what]["peft"],
            f"{found[what]['ratio']:.3f}",
        )
        for what in ("inject", "save", "load")
    ]
    return rows(("", "ours, seconds", "PEFT, seconds", "ours over PEFT"), lines)


def mixed() -> str:
    """A batch with several adapters."""
    lines = [
        (
            f"adapters: {r['adapters']}, tokens: {r['examples']} x {r['tokens']}",
            r["ours_seconds"],
            r["peft_seconds"],
            f"{r['times_as_fast']:.2f}",
            spread(r["spread"]),
            f"{r['base_times_as_fast']:.2f}",
        )
        for r in read("one_adapter_an_example")["batches"]
    ]
    head = ("one forward", "ours, seconds", "PEFT, seconds", "as fast, times", "spread", "the bare base, times")
    return rows(head, lines)


def classifying() -> str:
    """Classification beside other tools."""
    found = read("classification")
    lines = []
    for name, r in found.items():
        if isinstance(r, dict):
            apart = r["largest_difference_of_losses"]
            times = ("", "") if name == "ours" else (f"{r['times_as_fast']:.2f}", spread(r["spread"]))
            losses = "" if apart is None or name == "ours" else f"{apart:.0e}"
            lines.append((name, r["examples_per_second"], *times, losses))
    return rows(("", "examples a second", "ours is as fast, times", "spread", "losses apart by"), lines)


def growing() -> str:
    """What the largest of each size costs beside the smallest."""
    found = read("cost_against_size")
    lines = []
    for name in ("rank", "layers", "tokens", "adapters", "adapters in a batch"):
        first, *_, last = found[name]
        r = found[name][last]
        kept = f"{r['kept_mib'] / found[name][first]['kept_mib']:.2f}" if "kept_mib" in r else ""
        sizes, times = f"{name}: {first} to {last}", f"{r['over_smallest']:.2f}"
        lines.append((sizes, times, spread(r["spread"]), r.get("by_arithmetic", ""), kept))
    return rows(("", "time, times", "spread", "by arithmetic", "kept, times"), lines)


TABLES = {
    "one_step": one_step,
    "fine_tuning": fine_tuning,
    "classifying": classifying,
    "cached": cached,
    "starting": starting,
    "mixed": mixed,
    "growing": growing,
}


def page(text: str) -> str:
    """A page with its tables written anew."""
    return PLACE.sub(lambda found: found.group(1) + TABLES[found.group(2)]() + found.group(3), text)


if __name__ == "__main__":
    from plots import draw

    PAGE.write_text(page(PAGE.read_text()))
    (PAGE.parent / "cost_against_size.png").write_bytes(draw(read("cost_against_size")))
