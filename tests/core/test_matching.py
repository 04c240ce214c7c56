"""Patterns: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from lightning_peft import LoRA, Selective, adapt
from lightning_peft.core.matching import match_modules


def _placed(model, **options):
    return adapt(model, LoRA(r=1, **options)).tree.record.layers


def test_a_list_names_exact_modules_or_dotted_suffixes(build):
    assert _placed(build("llama"), target_modules=["layers.0.self_attn.q_proj", "up_proj"]) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(ValueError, match=r"'_proj' matches no module; did you mean"):
        _placed(build("llama"), target_modules=["_proj"])


def test_a_string_is_a_regular_expression_for_the_whole_name(build):
    assert len(_placed(build("llama"), target_modules=r".*\.(q|v)_proj")) == 4
    with pytest.raises(ValueError, match="matches no module"):
        _placed(build("llama"), target_modules="q_proj")
    with pytest.raises(ValueError, match="is no regular expression"):
        _placed(build("llama"), target_modules="(")


@pytest.mark.parametrize(
    ("name", "count", "head"), [("bert", 13, "classifier"), ("gpt2", 8, "lm_head"), ("llama", 14, "lm_head")]
)
def test_all_linear_takes_every_linear_but_the_output_head(build, name, count, head):
    placed = _placed(build(name))
    assert len(placed) == count
    assert not any(head in n for n in placed)


def test_a_router_that_gives_two_tensors_is_no_linear_layer_unless_it_is_named():
    config = Llama4TextConfig(
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        num_local_experts=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config)
    ids = torch.arange(14).view(2, 7)
    adapter = adapt(model, LoRA(r=2))
    assert not [n for n in adapter.tree.layers_by_module if "router" in n]
    model(input_ids=ids).logits.sum().backward()  # the shared expert's output is added to in place
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.remove()
    adapt(model, LoRA(r=2, target_modules=["router"]))
    with pytest.raises(TypeError, match=r"LoRA adds to one tensor, but a Llama4Router gives a tuple: exclude it"):
        model(input_ids=ids)


def test_a_models_own_kind_of_linear_layer_is_one():
    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    names = {n.rpartition(".")[2] for n in _placed(FalconForCausalLM(config))}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_every_pattern_must_match_or_the_nearest_names_are_listed(build):
    with pytest.raises(ValueError, match=r"'qurey' matches no module; did you mean 'query'"):
        _placed(build("bert"), target_modules=["key", "qurey"])
    with pytest.raises(ValueError, match=r"exclude_modules: 'dens' matches no module; did you mean"):
        _placed(build("bert"), exclude_modules=["dens"])
    with pytest.raises(ValueError, match=r"modules_to_save: 'clasifier' matches no module; did you mean 'classifier'"):
        _placed(build("bert"), modules_to_save=["clasifier"])
    with pytest.raises(ValueError, match=r"layers_to_transform: no module in layer \[7\]; .* layers 0 to 1"):
        _placed(build("bert"), layers_to_transform=[0, 7])
    with pytest.raises(ValueError, match=r"'LayerNorm' matches .* a LayerNorm; expected Linear"):
        _placed(build("bert"), target_modules=["LayerNorm"])
    with pytest.raises(ValueError, match="found no Linear in Sequential"):
        _placed(nn.Sequential(nn.ReLU()))


def test_layers_and_exclusions_narrow_the_match(build):
    everything = _placed(build("bert"))
    some = _placed(build("bert"), layers_to_transform=1, exclude_modules=["query", "key"])
    assert some == [n for n in everything if "layer.1." in n and not n.endswith(("query", "key"))]


def test_a_failed_adaptation_changes_nothing(build):
    model = build("bert")
    classes, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="matches no module"):
        adapt(model, LoRA(target_modules=["nothing"]))
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "adapters")


def test_selective_conditions_narrow_each_other_and_name_what_is_wrong(build):
    adapter = adapt(build("bert"), Selective(last_layers=1, parameter_types=["bias"]))
    assert all("layer.1." in n and n.endswith("bias") for n in adapter.tree.record.in_place)
    with pytest.raises(ValueError, match=r"parameter_types has 'biases'; did you mean 'bias'"):
        Selective(parameter_types=["biases"])
    with pytest.raises(ValueError, match="last_layers=9, but the model has 2"):
        adapt(build("bert"), Selective(last_layers=9))
    with pytest.raises(ValueError, match=r"no parameter of LlamaForCausalLM meets parameter_types=\['bias'\]"):
        adapt(build("llama"), Selective(parameter_types=["bias"]))


def test_a_name_that_is_taken_or_unusable_is_refused(build):
    model = build("bert")
    adapt(model, LoRA(r=1))
    with pytest.raises(ValueError, match="there is already an adapter 'default'"):
        adapt(model, LoRA(r=1))
    with pytest.raises(ValueError, match="an adapter's name consists of letters"):
        adapt(build("bert"), LoRA(r=1), "a.b")
    with pytest.raises(ValueError, match=r"'bert.pooler.dense' is already adapted|is already adapted as part"):
        adapt(nn.Sequential(model), LoRA(r=1))


def test_all_linear_is_named_when_it_is_misspelt_or_put_into_a_list(build):
    with pytest.raises(ValueError, match="matches no module; did you mean 'all-linear'"):
        _placed(build("bert"), target_modules="all_linear")
    with pytest.raises(ValueError, match="'all-linear' matches no module; write target_modules='all-linear', not as"):
        _placed(build("bert"), target_modules=["all-linear"])


def test_matches_come_in_the_models_order(build):
    names = match_modules(build("bert"), ["value", "query"])
    assert names == sorted(names, key=[n for n, _ in build("bert").named_modules()].index)
