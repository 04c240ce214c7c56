"""What a training step with LoRA costs as things grow: ranks, layers, tokens, adapters.

    python benchmarks/cost_against_size.py

Llamas of random weights, LoRA on all their linear layers. Sizes take turns in one process, and each is compared with
the smallest of the same round; a batch with an adapter for each example is a forward, all else a step, for which also
the bytes are counted that wait for the backward pass. The figures go to ``benchmarks/results/cost_against_size.json``,
from which ``python benchmarks/tables.py`` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from one_step import MIB, kept
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, LlamaModel

from lightning_peft import LoRA, activate, adapt, adapter_names

RANKS = (4, 8, 16, 32, 64, 128, 256)
LAYERS = (4, 8, 16, 32, 64)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
WIDE, NARROW = 512, 128
EXAMPLES = 64


def base(hidden: int, layers: int) -> Module:
    """A Llama of a usual shape."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, num_attention_heads=hidden // 64, vocab_size=256, max_position_embeddings=TOKENS[-1])
    return LlamaModel(config).train()


def ids(rows: int, tokens: int) -> Tensor:
    """Some tokens."""
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def arithmetic(hidden: int, tokens: int, rank: int) -> float:
    """Operations for a token in a layer, in millions: the frozen weights', LoRA's, and attention's.

    Weights take 2 operations in the forward and 2 in the backward pass, LoRA's 6; causal attention looks at half of
    the tokens, with 4 operations for each number of their states in the forward and 10 in the backward pass, which
    makes the scores again.
    """
    wide = hidden * 11 // 4
    weights = 4 * hidden * hidden + 3 * hidden * wide
    ends = 4 * 2 * hidden + 3 * (hidden + wide)
    return (4 * weights + 6 * rank * ends + 14 * hidden * tokens / 2) / 1e6


class Step:
    """A training step without the optimizer, whose own time is proportional to what trains.

    Args:
        hidden: the model's width.
        layers: its layers.
        tokens: of the only row.
        rank: of LoRA.
        adapters: how many the model has; the first is active.
    """

    def __init__(self, hidden: int, layers: int, tokens: int, rank: int = 16, adapters: int = 1) -> None:
        self.model, self.ids = base(hidden, layers), ids(1, tokens)
        self.arithmetic = tokens * layers * arithmetic(hidden, tokens, rank)
        for number in range(adapters):
            adapt(self.model, LoRA(r=rank, lora_alpha=rank), name=f"a{number}")
        activate(self.model, "a0")

    def loss(self) -> Tensor:
        """Of any kind."""
        said: Tensor = self.model(input_ids=self.ids).last_hidden_state
        return said.square().mean()

    def __call__(self) -> None:
        """Forward and backward."""
        self.model.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]

    def kept(self) -> float:
        """MiB that wait for the backward pass."""
        return kept(self.loss(), self.model) / MIB


class Mixed:
    """A forward of a batch whose examples have adapters of their own, one after another.

    Args:
        adapters: how many there are.
    """

    def __init__(self, adapters: int) -> None:
        self.model, self.ids = base(NARROW, 4), ids(EXAMPLES, 16)
        for number in range(adapters):
            adapt(self.model, LoRA(r=16, lora_alpha=16), name=f"a{number}")
        self.names = [f"a{n % adapters}" for n in range(EXAMPLES)]

    @torch.no_grad()
    def __call__(self) -> None:
        """The forward."""
        with adapter_names(self.model, self.names):
            self.model(input_ids=self.ids)


def in_turns(make: Callable[[int], Any], sizes: Iterable[int], repeats: int) -> dict[str, Any]:
    """Each size's time over the smallest one's of the same round; of a step also what it keeps."""
    runs = {size: make(size) for size in sizes}
    for run in runs.values():
        run()
    seconds: dict[int, list[float]] = {size: [] for size in runs}
    for turn in range(repeats):
        for size in sorted(runs, reverse=bool(turn % 2)):
            began = time.perf_counter()
            runs[size]()
            seconds[size].append(time.perf_counter() - began)
    found: dict[str, Any] = {}
    for size, run in runs.items():
        ratios = sorted(a / b for a, b in zip(seconds[size], seconds[min(runs)], strict=True))
        found[str(size)] = {
            "milliseconds": round(1000 * statistics.median(seconds[size]), 2),
            "over_smallest": round(statistics.median(ratios), 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
        if isinstance(run, Step):
            found[str(size)] |= {
                "by_arithmetic": round(run.arithmetic / runs[min(runs)].arithmetic, 3),
                "kept_mib": round(run.kept(), 2),
            }
    return found


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="the two smallest sizes of each, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cost_against_size.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
        "rank": (lambda n: Step(WIDE, 2, 512, rank=n), RANKS),
        "layers": (lambda n: Step(NARROW, n, 256), LAYERS),
        "tokens": (lambda n: Step(WIDE, 2, n), TOKENS),
        "adapters": (lambda n: Step(NARROW, 4, 512, adapters=n), ADAPTERS),
        "adapters in a batch": (Mixed, ADAPTERS),
    }
    found: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
    for name, (make, sizes) in runs.items():
        found[name] = in_turns(make, sizes[:2] if options.small else sizes, options.repeats)
        print(f"{name:<20}{'ms':>10}{'over smallest':>15}{'spread':>16}{'kept MiB':>10}")
        for size, row in found[name].items():
            spread, mib = "{:.2f} to {:.2f}".format(*row["spread"]), row.get("kept_mib", "")
            print(f"{size:<20}{row['milliseconds']:>10}{row['over_smallest']:>15}{spread:>16}{mib:>10}", flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
