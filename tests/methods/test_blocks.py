"""Blocks of models that are not known: what to name, and what else would do."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_peft import BottleneckAdapter, adapt


class Model(nn.Module):
    """Two layers with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        layer = {"mixer": nn.Linear(8, 8), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8), "norm": nn.LayerNorm(8)}
        self.stem = nn.Linear(4, 8)
        self.stack = nn.ModuleList([nn.ModuleDict(layer), nn.ModuleDict(layer)])


def test_unknown_blocks_are_answered_with_the_models_modules_and_with_doing_without():
    model = Model()
    with pytest.raises(
        ValueError,
        match=r"does not know the attention blocks of Model; name them in attention_modules \(its modules: mixer, fc1, "
        r"fc2, norm\), or leave them without a layer by mh_adapter=False",
    ):
        adapt(model, BottleneckAdapter(feed_forward_modules=["fc2"]))
    with pytest.raises(ValueError, match=r"the feed-forward blocks .* in feed_forward_modules .* output_adapter=False"):
        adapt(model, BottleneckAdapter(attention_modules=["mixer"]))
    adapter = adapt(model, BottleneckAdapter(feed_forward_modules=["fc2"], mh_adapter=False))
    assert all(n.endswith("fc2") for n in adapter.tree.record.layers)


def test_a_model_without_numbered_layers_shows_whole_names():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"\(its modules: first, second\)"):
        adapt(model, BottleneckAdapter())
