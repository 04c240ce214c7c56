"""Blocks of models that are not known: what to name, and what else would do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import BottleneckAdapter, Compacter, adapt


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


PFEIFFER = BottleneckAdapter(mh_adapter=False, original_ln_before=True, reduction_factor=4)


@torch.no_grad()
def test_pfeiffers_bottleneck_reads_the_normed_sum_and_adds_to_what_the_norm_takes(build, call, perturb):
    model, plain = build("bert"), build("bert")
    adapter = adapt(model, PFEIFFER)
    perturb(adapter, 0.3)
    for i, block in enumerate(plain.bert.encoder.layer):
        layer = adapter.tree.layers_by_module[f"bert.encoder.layer.{i}.output.LayerNorm"]

        def forward(hidden, x, block=block.output, layer=layer):
            r = block.dense(hidden)
            z = torch.relu(block.LayerNorm(r + x) @ layer.down_weight.T + layer.down_bias)
            return block.LayerNorm(z @ layer.up_weight.T + layer.up_bias + r + x)

        block.output.forward = forward
    torch.testing.assert_close(call(model, "bert"), call(plain, "bert"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5", [f"{s}coder.block.{i}.layer.{n}" for s, n in (("de", 2), ("en", 1)) for i in (0, 1)]),
    ],
)
def test_where_the_norm_comes_first_pfeiffers_bottleneck_reads_what_the_layer_gives(build, name, places):
    assert sorted(adapt(build(name), PFEIFFER).tree.record.layers) == places


def test_a_norm_that_is_named_is_normed_anew():
    model = Model()
    named = BottleneckAdapter(mh_adapter=False, feed_forward_modules=["norm"], original_ln_before=True)
    adapter = adapt(model, named)
    layer = adapter.tree.layers_by_module["stack.0.norm"]
    nn.init.normal_(layer.up_bias)
    x = torch.randn(3, 8)
    expected = nn.functional.layer_norm(x + layer.up_bias, (8,))
    torch.testing.assert_close(model.stack[0]["norm"](x), expected)


def test_a_sum_that_no_module_has_is_refused(build):
    both = BottleneckAdapter(original_ln_before=True)
    with pytest.raises(
        ValueError,
        match=r"original_ln_before: no module takes or gives the sum of 'transformer.h.0.attn' and its input; choose "
        r"mh_adapter=False, or name other modules in attention_modules",
    ):
        adapt(build("gpt2"), both)
    assert len(adapt(build("bert"), both).tree.record.layers) == 4
    with pytest.raises(ValueError, match="take it or is_parallel, not both"):
        BottleneckAdapter(original_ln_before=True, is_parallel=True)


@torch.no_grad()
@pytest.mark.parametrize("method", [BottleneckAdapter(), Compacter(reduction_factor=4), PFEIFFER])
def test_the_models_own_dropout_leaves_alone_what_a_bottleneck_adds(build, call, method):
    model = build("bert")
    adapter = adapt(model, method)
    for block in model.bert.encoder.layer:  # all that the blocks give is dropped, and only that
        block.attention.output.dropout.p = block.output.dropout.p = 1.0
        block.attention.output.dropout.train()
        block.output.dropout.train()
    before = call(model, "bert")
    for name, parameter in adapter.tree.named_parameters():
        if name.endswith("up_bias"):
            nn.init.normal_(parameter)
    assert not torch.allclose(call(model, "bert"), before, atol=1e-3)
