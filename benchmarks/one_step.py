"""One training step of a Llama with LoRA on every linear layer: its time, and what it keeps for the backward pass.

    python benchmarks/one_step.py

Beside it, in the same process and in turns: Hugging Face PEFT, and the floor: the frozen model with gradients for its
inputs alone. All take the loss the same way, from all logits, so that only the adapters differ; the last rows take
the loss as the tasks of this package do. The figures go to ``benchmarks/results/one_step.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, adapt
from lightning_peft.tasks.counted import HiddenAt, counted

MIB = 2**20
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}


def base(small: bool) -> Module:
    """The model, always with the same weights."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 1000} if small else {**SHAPE, "vocab_size": 32_000}
    model: Module = LlamaForCausalLM(LlamaConfig(**shape))
    return model.train()


def floor(model: Module) -> Module:
    """Frozen, with a gradient for what its first layer reads."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())  # type: ignore[operator]
    return model


def ours(model: Module, dropout: float = 0.0) -> Module:
    """LoRA of this package, its B away from zero, which would leave A without a gradient."""
    adapt(model, LoRA(r=16, lora_alpha=32, lora_dropout=dropout))
    return _moved(model)


def hf_peft(model: Module, dropout: float = 0.0) -> Module:
    """LoRA of Hugging Face PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return _moved(get_peft_model(model, config))  # type: ignore[arg-type]


def _moved(model: Module) -> Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return model


def from_all_logits(model: Any, ids: Tensor) -> Tensor:
    """The loss as transformers takes it."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def in_chunks(model: Any, ids: Tensor) -> Tensor:
    """The loss as the tasks of this package take it; here every token counts."""
    said = counted(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return said.total() / len(said.labels)


RUNS: dict[str, tuple[Callable[[Module], Module], Callable[[Any, Tensor], Tensor]]] = {
    "floor": (floor, from_all_logits),
    "ours": (ours, from_all_logits),
    "ours, dropout": (lambda m: ours(m, 0.05), from_all_logits),
    "peft": (hf_peft, from_all_logits),
    "peft, dropout": (lambda m: hf_peft(m, 0.05), from_all_logits),
    "floor, loss in chunks": (floor, in_chunks),
    "ours, loss in chunks": (ours, in_chunks),
    "ours, dropout, in chunks": (lambda m: ours(m, 0.05), in_chunks),
}


def kept_in_chunks(model: Any, ids: Tensor) -> int:
    """The same where the loss is taken in chunks: the graph up to the head, what the head reads and its gradient.

    To walk through chunks that are computed again would compute them.
    """
    said = counted(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert isinstance(said, HiddenAt)
    return kept(said.hidden, model) + 2 * said.hidden.nbytes


def kept(loss: Tensor, model: Module) -> int:
    """Bytes of storages that a graph keeps for its backward pass, the model's own apart.

    The graph is walked: hooks on saved tensors would see the same, but something in their place is never kept by
    the layers of this package that make it again.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())
        saved += [v for v in getattr(node, "__dict__", {}).values()]
        for value in saved:
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def measure(precision: str, repeats: int, small: bool) -> dict[str, Any]:
    """Every run's step time over the floor's of the same round, and its kept bytes."""
    ids = torch.randint(0, 1000, (4, 32 if small else 256), generator=torch.Generator().manual_seed(2))
    models = {name: change(base(small)) for name, (change, _) in RUNS.items()}

    def loss(name: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return RUNS[name][1](models[name], ids)

    def step(name: str) -> tuple[float, float]:
        models[name].zero_grad()
        began = time.perf_counter()
        value = loss(name)
        value.backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - began, value.item()

    def held(name: str) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            if RUNS[name][1] is in_chunks:
                return kept_in_chunks(models[name], ids)
        return kept(loss(name), models[name])

    losses = {name: step(name)[1] for name in RUNS}  # and what is slow the first time
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for turn in range(repeats):
        names = list(RUNS) if turn % 2 else list(RUNS)[::-1]
        for name in names:
            seconds[name].append(step(name)[0])
    found = {}
    for name in RUNS:
        of = "floor, loss in chunks" if name.endswith("chunks") else "floor"
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds[of], strict=True))
        found[name] = {
            "seconds": round(statistics.median(seconds[name]), 3),
            "over_floor": round(statistics.median(ratios), 3),
            "over_floor_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            "kept_mib": round(held(name) / MIB, 1),
            "loss": round(losses[name], 4),
        }
    return found


def main() -> None:
    """Measures in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="two layers, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "one_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
    for precision in ("32-true", "bf16-mixed"):
        found[precision] = measure(precision, options.repeats, options.small)
        print(f"{precision:<26}{'seconds':>9}{'over floor':>12}{'spread':>16}{'kept MiB':>10}{'loss':>10}")
        for name, row in found[precision].items():
            low, high = row["over_floor_spread"]
            spread = f"{low:.2f} to {high:.2f}"
            numbers = f"{row['seconds']:>9.2f}{row['over_floor']:>12.3f}{spread:>16}{row['kept_mib']:>10.1f}"
            print(f"{name:<26}{numbers}{row['loss']:>10.4f}", flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
