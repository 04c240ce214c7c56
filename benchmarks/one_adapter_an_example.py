"""A batch whose examples have adapters of their own: how long a forward takes, beside Hugging Face PEFT's.

    python benchmarks/one_adapter_an_example.py

One, eight and 64 LoRAs on every linear layer of a Llama, at least eight examples, in turns in one process; the outputs
agree. The bare base, which any of them has to run, is the limit. The figures go to
``benchmarks/results/one_adapter_an_example.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, adapt, adapter_names

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}

EXAMPLES = 8  # at least


def base(layers: int) -> Module:
    """The model, always with the same weights."""
    torch.manual_seed(0)
    model: Module = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, vocab_size=1000))
    return model.eval()


def fill(model: Module, names: list[str]) -> None:
    """The same numbers in both packages' adapters, by the place of each tensor."""
    for key, parameter in model.named_parameters():
        found = re.search(r"model\.(layers\.[\w.]+?)\.(lora_[AB])", key)
        name = next((n for n in names if n in key.split(".")), None)
        if found is not None and name is not None:
            seed = zlib.crc32(f"{found.groups()} {name}".encode())
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))


def both(layers: int, names: list[str]) -> tuple[Any, Any]:
    """Two models with the same adapters: ours and PEFT's."""
    from peft import LoraConfig, get_peft_model

    mine = base(layers)
    for name in names:
        adapt(mine, LoRA(r=16, lora_alpha=16), name=name)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    theirs: Any = get_peft_model(base(layers), config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        theirs.add_adapter(name, config)
    fill(mine, names)
    fill(theirs, names)
    return mine, theirs.eval()


def measured(models: tuple[Any, Any, Module], names: list[str], tokens: int, repeats: int) -> dict[str, Any]:
    """Ours, PEFT's and the bare base in turns, on a batch with an example for each name."""
    mine, theirs, bare = models
    ids = torch.randint(0, 1000, (len(names), tokens), generator=torch.Generator().manual_seed(2))

    def ours() -> Tensor:
        with adapter_names(mine, names):
            logits: Tensor = mine(input_ids=ids).logits
        return logits

    def peft() -> Tensor:
        logits: Tensor = theirs(input_ids=ids, adapter_names=names).logits
        return logits

    def floor() -> Tensor:
        logits: Tensor = bare(input_ids=ids).logits
        return logits

    runs: dict[str, Callable[[], Tensor]] = {"base": floor, "ours": ours, "peft": peft}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        floor()
        apart = float((ours() - peft()).abs().max())
        for turn in range(repeats):
            for name in sorted(runs, reverse=bool(turn % 2)):
                began = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - began)
    ratios = sorted(b / a for a, b in zip(times["ours"], times["peft"], strict=True))
    limits = [b / a for a, b in zip(times["base"], times["peft"], strict=True)]
    return {
        **{f"{name}_seconds": round(statistics.median(t), 4) for name, t in times.items()},
        "times_as_fast": round(statistics.median(ratios), 2),
        "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "base_times_as_fast": round(statistics.median(limits), 2),
        "largest_difference": apart,
    }


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--most", type=int, default=2048, help="tokens in a batch, above which it is left out")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "one_adapter_an_example.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"threads": options.threads, "load_before": round(os.getloadavg()[0], 1), "batches": []}
    for adapters in options.adapters:
        known = [f"a{i}" for i in range(adapters)]
        models = (*both(options.layers, known), base(options.layers))
        names = known if adapters >= EXAMPLES else (known * EXAMPLES)[:EXAMPLES]
        for tokens in options.tokens:
            if len(names) * tokens <= options.most:
                sizes = {"adapters": adapters, "examples": len(names), "tokens": tokens}
                found["batches"].append({**sizes, **measured(models, names, tokens, options.repeats)})
                print(json.dumps(found["batches"][-1]), flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
