"""Layers that join the training one after another."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import Selective, adapt, load_adapter


def _moving(model, adapter, call, name, steps):
    """The layers, by a word of their parameters' names, that each step moves."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    seen = []
    for step in range(1, steps + 1):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        call(model, name).pow(2).mean().backward()
        adapter.before_step(step, steps)
        optimizer.step()
        adapter.after_step(step, steps)
        optimizer.zero_grad()
        seen.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
    return seen


def test_layers_join_from_the_last_to_the_embeddings(build, call):
    model = build("bert")
    adapter = adapt(model, Selective(unfreeze_until=0.5))
    seen = _moving(model, adapter, call, "bert", 8)
    parts = {
        "top": {n for n in seen[-1] if "layer.1." in n or "pooler" in n or "classifier" in n},
        "middle": {n for n in seen[-1] if "layer.0." in n},
        "bottom": {n for n in seen[-1] if "embeddings" in n},
    }
    assert all(parts.values())
    # three groups over the first four of eight steps: they join at steps 1, 3 and 5
    expected = [{"top"}] * 2 + [{"top", "middle"}] * 2 + [{"top", "middle", "bottom"}] * 4
    assert [{part for part, names in parts.items() if names & now} for now in seen] == expected


def test_the_last_layers_of_two_stacks_begin_together(build, call):
    model = build("t5")
    adapter = adapt(model, Selective(unfreeze_until=1.0, parameter_types=["weight"]))
    first = _moving(model, adapter, call, "t5", 4)[0]
    assert {n.split(".")[0] for n in first if ".block.1." in n} == {"encoder", "decoder"}
    assert not [n for n in first if ".block.0." in n]


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="unfreeze_until must be above 0 and at most 1"):
        Selective(unfreeze_until=share)


@pytest.mark.parametrize("keep", [True, False])
def test_running_statistics_that_moved_are_saved_whether_originals_are_kept_or_not(build, call, tmp_path, keep):
    model = build("convnet")
    adapter = adapt(model, Selective(keep_originals=keep))
    model.train()
    for _ in range(3):
        call(model, "convnet")
    model.eval()
    assert model.norm.num_batches_tracked == 3
    adapter.save(tmp_path / "adapter")
    again = build("convnet")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert not torch.equal(call(build("convnet"), "convnet"), call(model, "convnet"))
        assert torch.equal(call(again.eval(), "convnet"), call(model, "convnet"))


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 2e-4),
        ({"unfreeze_until": 0.5}, 2e-4),
        ({"target_modules": ["encoder"]}, 2e-4),
        ({"parameter_types": ["bias"]}, 5e-3),
        ({"parameter_types": ["norm"]}, 5e-3),
        ({"parameter_types": ["head"]}, 2e-2),
        ({"parameter_types": ["embedding"]}, 6e-3),
        ({"last_layers": 2}, 5e-4),
        ({"layers_to_transform": [4, 5]}, 5e-4),
        ({"last_layers": 2, "parameter_types": ["weight"]}, 5e-4),
        ({"last_layers": 2, "parameter_types": ["bias"]}, 5e-3),
        ({"parameter_types": ["bias", "head"]}, 5e-3),
        ({"parameter_types": ["bias", "weight"]}, 2e-4),
    ],
)
def test_the_rate_is_that_of_what_trains_and_of_several_the_smallest(options, rate):
    assert Selective(**options).learning_rate == Selective(**options, learning_rate=None).learning_rate == rate
    assert Selective(**options, learning_rate=1e-4).learning_rate == 1e-4
