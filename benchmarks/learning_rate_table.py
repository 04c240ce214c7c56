"""The table of ``docs/guide/learning_rate.md``, out of what `learning_rates.py` measured.

python benchmarks/learning_rate_table.py    # writes the table into the page
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "learning_rate.md"
PLACE = re.compile(r"(?<=<!-- learning_rates -->\n).*?(?=<!-- end -->)", re.S)
NEAR = 3  # rates around the default, without which a best one says nothing

PUBLISHED = {
    "lora": "4e-4, 5e-4 (RoBERTa base); 2e-4 (GPT-2, GPT-3) ([2106.09685](https://arxiv.org/abs/2106.09685))",
    "ia3": "3e-3, Adafactor (T0) ([2205.05638](https://arxiv.org/abs/2205.05638))",
    "bitfit": "1e-4 to 1e-3 (BERT) ([2106.10199](https://arxiv.org/abs/2106.10199))",
    "houlsby": "3e-5 to 3e-3 (BERT) ([1902.00751](https://arxiv.org/abs/1902.00751))",
    "prompt_tuning": "0.3, Adafactor (T5) ([2104.08691](https://arxiv.org/abs/2104.08691))",
    "prefix_tuning_mlp": "5e-5 (GPT-2) ([2101.00190](https://arxiv.org/abs/2101.00190))",
    "adalora": "5e-4 to 2.2e-3 (DeBERTa v3) ([2303.10512](https://arxiv.org/abs/2303.10512))",
    "full": "2e-5 to 5e-5 (BERT) ([1810.04805](https://arxiv.org/abs/1810.04805))",
}
"""Of the methods' own papers; where nothing stands here, none was looked up."""


def reached(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy and validation loss at one rate, means over the seeds."""
    losses = [row["loss"] for row in rows]
    loss = "none" if None in losses else f"{mean(losses):.2f}"
    return f"{mean(row['accuracy'] for row in rows):.3f}, {loss}"


def table(rows: Sequence[dict[str, Any]], defaults: Mapping[str, float]) -> str:
    """The table in Markdown, and which methods were not swept.

    Args:
        rows: the runs, each a line of the results.
        defaults: all methods that there are to sweep over, with their own rates.
    """
    runs: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[row["method"]][row["factor"]].append(row)
    lines = [
        "| `method=` | default | accuracy, loss | best | accuracy, loss | tried | published |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    swept = [name for name in defaults if len(runs[name]) >= NEAR]
    for name, default in defaults.items():
        by_factor, published = runs[name], PUBLISHED.get(name, "")
        if name not in swept:
            lines += [f"| `{name}` | {default:g} | | | | | {published} |"] if published else []
            continue
        best = max(by_factor.values(), key=lambda found: mean(row["accuracy"] for row in found))
        first = by_factor[1.0]
        tried = ", ".join(f"{by_factor[factor][0]['lr']:g}" for factor in sorted(by_factor))
        cells = (f"`{name}`", f"{default:g}", reached(first), f"{best[0]['lr']:g}", reached(best), tried, published)
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    left = [name for name in defaults if name not in swept]
    if left:
        lines += ["", f"Not swept: {', '.join(f'`{name}`' for name in left)}."]
    return "\n".join(lines) + "\n"


def page(text: str, results: str, defaults: Mapping[str, float]) -> str:
    """A page with its table written anew.

    Args:
        text: the page.
        results: the lines of the results.
        defaults: all methods that there are to sweep over, with their own rates.
    """
    rows = [json.loads(line) for line in results.splitlines()]
    return PLACE.sub(lambda _: table(rows, defaults), text)


if __name__ == "__main__":
    from learning_rates import METHODS, RESULTS, method_named

    own = {name: method_named(name).learning_rate for name in METHODS}
    PAGE.write_text(page(PAGE.read_text(), RESULTS.read_text(), own))
