"""Many adapters come and go on one base: nothing of those that went stays, and the others answer as they should."""

from __future__ import annotations

import copy
import gc
import os
import sys
import weakref

import pytest
import torch
from torch import nn

from lightning_peft import IA3, Adapter, BottleneckAdapter, LoRA, PromptTuning, adapt, adapter_names, load_adapter


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@torch.no_grad()
def test_many_adapters_are_loaded_and_removed_with_the_latest_in_one_batch(tmp_path):
    kept, x = [], torch.randn(8, 6)
    for number in range(5):
        adapter = adapt(base(), LoRA(r=2, lora_alpha=3))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
        plain = base()
        for name, layer in adapter.tree.layers_by_module.items():
            plain[int(name)].weight += 3 / 2 * layer.lora_B @ layer.lora_A
        kept.append((adapter.save(tmp_path / str(number)), plain(x)))
    model, held, counts, trees = base(), [], [], []
    for number in range(64):
        if len(held) == len(x):
            Adapter(model, held.pop(0)[0]).remove()
        folder, expected = kept[number % len(kept)]
        adapter = load_adapter(model, folder, f"adapter-{number}")
        trees.append(weakref.ref(adapter.tree))
        held.append((adapter.name, expected))
        with adapter_names(model, [name for name, _ in held]):
            found = model(x[: len(held)])
        wanted = torch.stack([right[row] for row, (_, right) in enumerate(held)])
        torch.testing.assert_close(found, wanted)
        if number % 16 == 15:
            gc.collect()
            alive = sum(tree() is not None for tree in trees)
            counts.append((len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0, alive))
    assert counts[1] == counts[2] == counts[3]
    assert counts[3][1] == len(x)


@pytest.mark.parametrize(
    "method", [LoRA(r=2), IA3(), BottleneckAdapter(reduction_factor=4), PromptTuning(3)], ids=lambda m: type(m).__name__
)
def test_a_removed_adapter_and_a_dropped_model_are_freed(build, call, method):
    model = build("llama")
    adapt(model, LoRA(r=2), "resident")
    adapter = adapt(model, method, "guest")
    call(model, "llama").sum().backward()
    ends = [weakref.ref(adapter.tree), *(weakref.ref(layer) for layer in adapter.tree.layers_by_module.values())]
    adapter.remove()
    del adapter
    gc.collect()
    assert not any(end() is not None for end in ends)
    twin = weakref.ref(copy.deepcopy(model))
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert twin() is None
    assert whole() is None


def test_adding_an_adapter_takes_no_more_work_where_there_are_many(build):
    model, calls = build("llama"), []

    def count(frame, event, argument):
        calls[-1] += event == "call"

    for number in range(40):
        calls.append(0)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            adapt(model, LoRA(r=2), f"adapter-{number}")
        finally:
            sys.setprofile(before)
    assert calls[39] < 1.2 * calls[2]
