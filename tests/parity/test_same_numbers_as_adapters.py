"""AdapterHub's ``adapters``: the same outputs and the same training as those that it wrote down.

``make_adapters_reference.py`` made the values in an environment of its own, since ``adapters`` wants an older
transformers. Each case starts from its tensors, copied across by name. Where ``adapters`` does otherwise than a paper's
authors, ``AS_THEIRS`` does to our model what it does, and nothing else, so that the rest can be compared too.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from lightning_peft import BottleneckAdapter, Compacter, LoReFT, PrefixTuning, adapt
from lightning_peft.methods.invertible import couple
from lightning_peft.methods.loreft import orthonormal_rows

FOLDER = Path(__file__).parent / "adapters_reference"

METHODS = {
    "houlsby": {"reduction_factor": 4, "non_linearity": "silu"},
    "pfeiffer": {"reduction_factor": 4, "mh_adapter": False, "original_ln_before": True},
    "pfeiffer_attention": {"reduction_factor": 8, "original_ln_before": True},
    "parallel": {"reduction_factor": 4, "mh_adapter": False, "is_parallel": True, "scaling": 4.0},
    "madx": {"reduction_factor": 4, "mh_adapter": False, "original_ln_before": True, "inv_adapter": "nice"},
    "madx_houlsby": {"reduction_factor": 4, "non_linearity": "silu", "inv_adapter": "nice"},
    "compacter": {"reduction_factor": 4},
    "compacter_own_rules": {"reduction_factor": 2, "shared_phm_rule": False, "phm_rank": 2},
    "loreft": {"r": 3, "positions": "f2+l1"},
    "loreft_own_weights": {"r": 2, "positions": "f1+l2", "share_weights": False},
    "prefix": {"num_virtual_tokens": 3},
    "prefix_network": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
}
CLASSES = {"compacter": Compacter, "loreft": LoReFT, "prefix": PrefixTuning}
# what has to be named: a ViT's attention, and T5's layers where a parallel adapter reads what comes before the norm
NAMED = {
    "vit": {"attention_modules": ["attention"]},
    "t5-parallel": {"feed_forward_modules": r"encoder\.block\.\d\.layer\.1|decoder\.block\.\d\.layer\.2"},
}

# our name of a block -> theirs
BEFORE_NORMS = [
    (r"(.*)\.(attn|self_attn)", r"\1.attention_adapters.adapters.a."),
    (r"(.*\.\d+)(\.mlp)?", r"\1.output_adapters.adapters.a."),
]
BLOCKS = {
    **dict.fromkeys(("gpt2", "llama", "qwen3", "mixtral"), BEFORE_NORMS),
    "bert": [(r"(.*output)(\.\w+)?", r"\1.adapters.a.")],
    "t5": [(r"(.*layer\.\d+)(\.\w+)?", r"\1.adapters.a.")],
    "vit": [
        (r"vit\.layers\.(\d+)\.attention", r"vit.encoder.layer.\1.attention_adapters.adapters.a."),
        (r"vit\.layers\.(\d+)(\.mlp)?", r"vit.encoder.layer.\1.output.output_adapters.adapters.a."),
    ],
}
# our name of a tensor -> theirs, in a block
HALVES = (("down", "adapter_down.0"), ("up", "adapter_up"))
IN_BLOCK = {f"{ours}_{part}": f"{theirs}.{part}" for ours, theirs in HALVES for part in ("weight", "bias")}
PHM = {
    f"{ours}_{part}": f"{theirs}.{name}"
    for ours, theirs in HALVES
    for part, name in (("left", "W_left"), ("right", "W_right"), ("bias", "b"), ("rule", "phm_rule"))
}
# and of those that stand once in a model
COUPLING = {
    f"{f}_{ours}_{part}": f".invertible_adapters.a.{f.upper()}.{theirs}.{part}"
    for f in ("f", "g")
    for ours, theirs in (("down", 0), ("up", 2))
    for part in ("weight", "bias")
}
PREFIX = {
    "prompt_embeddings": ".control_trans",
    "embedding": ".wte.weight",
    "hidden_weight": ".control_trans.0.weight",
    "hidden_bias": ".control_trans.0.bias",
    "output_weight": ".control_trans.2.weight",
    "output_bias": ".control_trans.2.bias",
}
EDIT = {"rotation": "projection.weight", "weight": "learned_source.weight", "bias": "learned_source.bias"}


@cache
def _stored(name):
    """A model's file: its tensors and its metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        return tensors, {k: json.loads(v) for k, v in file.metadata().items()}


def _part(name, prefix):
    return {k.removeprefix(prefix): t for k, t in _stored(name)[0].items() if k.startswith(prefix)}


MODELS = sorted(f.stem for f in FOLDER.glob("*.safetensors"))
CASES = [(name, case) for name in MODELS for case in _stored(name)[1]["cases"]]
EDITS = [(name, case) for name, case in CASES if case.startswith("loreft")]


def _build(name):
    """The model from the stored weights, its names made those of this transformers."""
    kind = _stored(name)[1]["model"]
    cls = getattr(transformers, kind["class"])
    config = cls.config_class(**kind["config"])
    if name == "mixtral":  # the grouped products that transformers takes by itself know no float64
        config._experts_implementation = "eager"
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    return cls.from_pretrained(None, config=config, state_dict=_part(name, "base/"), **options).eval()


def _call(model, name, monkeypatch, **more):
    """The output; what models compute in float32 (norms, softmax) is in float64, as when the values were made."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model(**_part(name, "input/"), **more).logits


def _block(name, place):
    for ours, theirs in BLOCKS[name]:
        found = re.fullmatch(ours, place)
        if found:
            return found.expand(theirs)
    raise AssertionError(place)


def _names(name, case, key, stored):
    """Their names of what one of our tensors holds; several where ours has them stacked."""
    place, _, tensor = key.rpartition(".")
    if case.startswith("loreft"):
        unit = re.escape(place) + r"\.reft_layer\.refts\.a\.units\.\d\." + re.escape(EDIT[tensor])
        return sorted(k for k in stored if re.fullmatch(unit, k))
    if tensor in IN_BLOCK and not case.startswith("compacter"):
        return [_block(name, place) + IN_BLOCK[tensor]]
    if tensor in PHM:
        return [_block(name, place) + PHM[tensor]]
    end = {**COUPLING, **PREFIX, "phm_rule": "shared_parameters.a.phm_rule"}[tensor]
    return [k for k in stored if k.endswith(end)]


def _translated(name, case, which, adapter):
    """Their tensors under our names; each is used once."""
    stored = _part(name, f"{case}/{which}/")
    names = {key: _names(name, case, key, stored) for key in adapter.state_dict()}
    assert sorted(n for found in names.values() for n in found) == sorted(stored)
    shapes = {key: t.shape for key, t in adapter.state_dict().items()}
    return {key: torch.stack([stored[n] for n in found]).reshape(shapes[key]) for key, found in names.items()}


def _read_the_sum_before_the_norm(norm):
    """A parallel adapter of ``adapters`` reads what goes into the feed-forward's norm, not into the feed-forward."""

    def change(model, adapter):
        for name, layer in adapter.tree.layers_by_module.items():
            seen = {}
            before = model.get_submodule(f"{name.rpartition('.')[0]}.{norm}")
            before.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))
            layer.change = lambda h, seen=seen, of=layer.change: of(seen["x"])

    return change


def _without(*places):
    """It has no block there: no inverse at a native causal model's head, and none on a decoder's embeddings."""

    def change(model, adapter):
        for place in places:
            layer = adapter.tree.layers_by_module[place]
            layer.forward = lambda base, *args, **kwargs: base(*args, **kwargs)

    return change


def _couple_all_embeddings(where, embedding, *places):
    """It couples the sum of all embeddings, not the tokens' alone."""

    def change(model, adapter):
        block = adapter.tree.layers_by_module[embedding]
        _without(embedding, *places)(model, adapter)
        model.get_submodule(where).register_forward_hook(lambda _, args, x: couple(x, block.f, block.g))

    return change


def _as_it_is(model, adapter):
    """Nothing has to be done."""


AS_THEIRS = {
    ("gpt2", "parallel"): _read_the_sum_before_the_norm("ln_2"),
    ("llama", "parallel"): _read_the_sum_before_the_norm("post_attention_layernorm"),
    ("bert", "madx"): _couple_all_embeddings("bert.embeddings", "bert.embeddings.word_embeddings"),
    ("llama", "madx"): _without("lm_head"),
    ("t5", "madx"): _without("decoder.embed_tokens", "lm_head"),
    ("gpt2", "madx"): _couple_all_embeddings("transformer.drop", "transformer.wte", "lm_head"),
}


def _adapted(name, case):
    model = _build(name)
    options = {**METHODS[case], **NAMED.get(f"{name}-{case}", {})}
    if options.get("mh_adapter", True):
        options |= NAMED.get(name, {})
    adapter = adapt(model, CLASSES.get(case.split("_")[0], BottleneckAdapter)(**options))
    for key, tensor in _translated(name, case, "start", adapter).items():
        parameter = adapter.tree.get_parameter(key)
        parameter.data = tensor.clone()
    AS_THEIRS.get((name, case), _as_it_is)(model, adapter)
    # a prefix of adapters takes no positions from the text
    tokens = torch.arange(_part(name, "input/").get("input_ids", torch.empty(0, 0)).shape[1])
    more = {"position_ids": (tokens - 3)[None]} if case.startswith("prefix") else {}
    return model, adapter, more


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_base_gives_the_output_that_it_gave_under_the_older_transformers(name, monkeypatch):
    expected = _stored(name)[0]["base_output"]
    torch.testing.assert_close(_call(_build(name), name, monkeypatch), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_output_is_that_of_adapters(name, case, monkeypatch):
    model, _, more = _adapted(name, case)
    expected = _stored(name)[0][f"{case}/output"]
    torch.testing.assert_close(_call(model, name, monkeypatch, **more), expected, rtol=1e-10, atol=1e-10)
    assert (expected - _stored(name)[0]["base_output"]).abs().max() > 0.1


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ten_steps_give_the_losses_and_the_parameters_of_adapters(name, case, monkeypatch):
    model, adapter, more = _adapted(name, case)
    tensors, metadata = _stored(name)
    # an orthogonal map is made of other numbers there, so it rests; its gradient is compared below
    trained = [p for n, p in adapter.tree.named_parameters() if not n.endswith("rotation")]
    optimizer = torch.optim.SGD(trained, **metadata["optimizer"])
    losses = []
    for _ in range(10):
        loss = _call(model, name, monkeypatch, **more).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), tensors[f"{case}/losses"], rtol=1e-8, atol=1e-8)
    assert losses[-1] < losses[0]
    state = adapter.state_dict()
    for key, expected in _translated(name, case, "end", adapter).items():
        torch.testing.assert_close(state[key], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "case"), EDITS)
def test_the_gradient_of_an_orthogonal_map_is_that_of_adapters(name, case, monkeypatch):
    model, adapter, more = _adapted(name, case)
    _call(model, name, monkeypatch, **more).pow(2).mean().backward()
    stored = _part(name, f"{case}/gradient/")
    for place, layer in adapter.tree.layers_by_module.items():
        if hasattr(layer, "rotation"):
            theirs = torch.stack([stored[n] for n in _names(name, case, f"{place}.rotation", stored)])
            free = layer.rotation.detach().requires_grad_()
            (expected,) = torch.autograd.grad(orthonormal_rows(free), free, theirs)
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(layer.rotation.grad, expected, rtol=1e-8, atol=1e-10)
