"""How long an adapter takes to be injected, saved and loaded, beside Hugging Face PEFT, on 2,000 linear layers.

    python benchmarks/start_and_stop.py

Each round does both, one after the other, on fresh models. The figures go to
``benchmarks/results/start_and_stop.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft import LoRA, adapt, load_adapter

WIDTH, RANK = 64, 8


class Block(nn.Module):
    """Ten linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))


class Stack(nn.Module):
    """A model of many linear layers; it is never run."""

    def __init__(self, linears: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(linears // 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through all of them."""
        for block in self.blocks:
            for layer in block.layers:
                x = layer(x)
        return x


def ours(linears: int, folder: Path) -> dict[str, float]:
    """Seconds for each of the three."""
    model = Stack(linears)
    times = {}
    began = time.perf_counter()
    adapter = adapt(model, LoRA(r=RANK))
    times["inject"] = time.perf_counter() - began
    began = time.perf_counter()
    adapter.save(folder)
    times["save"] = time.perf_counter() - began
    fresh = Stack(linears)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")})
    began = time.perf_counter()
    load_adapter(fresh, folder)
    times["load"] = time.perf_counter() - began
    return times


def hf_peft(linears: int, folder: Path) -> dict[str, float]:
    """The same with PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    times = {}
    model = Stack(linears)
    began = time.perf_counter()
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=r".*layers\.\d+"))  # type: ignore[arg-type]
    times["inject"] = time.perf_counter() - began
    began = time.perf_counter()
    adapted.save_pretrained(str(folder))
    times["save"] = time.perf_counter() - began
    fresh = Stack(linears)
    began = time.perf_counter()
    PeftModel.from_pretrained(fresh, str(folder))  # type: ignore[arg-type]
    times["load"] = time.perf_counter() - began
    return times


def importing() -> float:
    """Seconds of ``import lightning_peft`` in a process of its own, torch's import apart."""
    code = "import torch, time; a = time.perf_counter(); import lightning_peft; print(time.perf_counter() - a)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--linears", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "start_and_stop.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {"ours": {}, "peft": {}}
    for turn in range(options.repeats + 1):
        for name, run in (("ours", ours), ("peft", hf_peft)):
            with tempfile.TemporaryDirectory() as folder:
                for what, seconds in run(options.linears, Path(folder) / "adapter").items():
                    if turn:  # the first round imports and warms up
                        found[name].setdefault(what, []).append(seconds)
    table: dict[str, Any] = {"linears": options.linears, "import_seconds": round(importing(), 3)}
    print(f"{'':<8}{'ours':>10}{'peft':>10}{'ratio':>8}")
    for what in ("inject", "save", "load"):
        mine, theirs = (found[name][what] for name in ("ours", "peft"))
        ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
        ratio = statistics.median(ratios)
        table[what] = {
            "ours": round(statistics.median(mine), 4),
            "peft": round(statistics.median(theirs), 4),
            "ratio": round(ratio, 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
        print(f"{what:<8}{table[what]['ours']:>9.3f}s{table[what]['peft']:>9.3f}s{ratio:>8.3f}")
    print(f"import lightning_peft: {table['import_seconds']} s")
    options.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
