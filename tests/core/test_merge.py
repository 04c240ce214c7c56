"""Merging: what it rounds, what it keeps, what it unties, and several merged adapters at once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertModel

from lightning_peft import (
    BOFT,
    IA3,
    OFT,
    Adapter,
    BottleneckAdapter,
    LoRA,
    MiSS,
    PromptTuning,
    Selective,
    activate,
    active_adapters,
    adapt,
    combine,
    load_adapter,
)
from lightning_peft.core.merge import fold
from lightning_peft.formats.merged import save_merged
from tests.method_table import CASES

MERGEABLE = [(row, name) for row, name in CASES if row.mergeable]


def weights(model):
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("adapters.")}


@torch.no_grad()
@pytest.mark.parametrize(("row", "name"), MERGEABLE, ids=[f"{row.name}-{name}" for row, name in MERGEABLE])
def test_a_merged_16_bit_weight_is_the_float32_sum_rounded_once(row, name, build, perturb):
    half = build(name).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    rounded, full = adapt(half, row.make()), adapt(exact, row.make())
    perturb(rounded)
    full.tree.load_state_dict(rounded.tree.state_dict())
    in_place = set(rounded.tree.record.in_place)
    rounded.merge()
    full.merge()
    sums = weights(exact)
    changed = 0
    for key, weight in weights(half).items():
        if key not in in_place and weight.dtype == torch.bfloat16:
            assert torch.equal(weight, sums[key].to(torch.bfloat16)), key
            changed += 1
    assert changed or in_place


@torch.no_grad()
def test_several_merged_adapters_are_rounded_once_too_and_come_back_one_by_one(build, call, perturb):
    def make(dtype):
        model = build("llama").to(torch.bfloat16).to(dtype)
        for name, method in (("a", LoRA(r=2)), ("b", OFT(oft_block_size=8)), ("c", IA3())):
            perturb(adapt(model, method, name), 0.1)
        activate(model, "a", "b", "c")
        return model

    half, exact = make(torch.bfloat16), make(torch.float32)
    base = weights(half)
    states = []
    adapted = call(exact, "llama")
    for name in ("a", "b", "c"):
        states.append((active_adapters(half), weights(half)))
        Adapter(half, name).merge()
        Adapter(exact, name).merge()
        torch.testing.assert_close(call(exact, "llama"), adapted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, weights(exact)[n].to(torch.bfloat16)) for n, t in weights(half).items())
    with Adapter(half, "a").disabled():
        assert all(torch.equal(t, base[n]) for n, t in weights(half).items())
    assert all(torch.equal(t, weights(exact)[n].to(torch.bfloat16)) for n, t in weights(half).items())
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"was merged over '{name}' into the same weights; unmerge it first"):
            Adapter(half, name).unmerge()
    for name, (active, state) in zip("cba", reversed(states), strict=True):
        Adapter(half, name).unmerge()
        assert active_adapters(half) == active
        assert all(torch.equal(t, state[n]) for n, t in weights(half).items())


@torch.no_grad()
def test_an_adapter_inside_another_is_merged_first(build, call, perturb):
    model = build("bert")
    after_dense = BottleneckAdapter(attention_modules=["attention.output.dense"], output_adapter=False)
    for name, method in (("a", LoRA(r=2)), ("b", IA3()), ("c", after_dense)):
        perturb(adapt(model, method, name), 0.1)
    activate(model, "a", "b")
    with pytest.raises(ValueError, match=r"'a' runs inside 'b' at .*merge 'a' first, or .*activate\(model, 'b', 'a'\)"):
        Adapter(model, "b").merge()
    activate(model, "c", "a")
    with pytest.raises(ValueError, match=r"'c' runs inside 'a' at 'bert.encoder.layer.0.attention.output.dense'"):
        Adapter(model, "a").merge()
    activate(model, "a", "c")
    adapted = call(model, "bert")
    Adapter(model, "a").merge()
    torch.testing.assert_close(call(model, "bert"), adapted, rtol=1e-4, atol=1e-5)
    assert active_adapters(model) == ("c",)
    Adapter(model, "a").unmerge()
    assert active_adapters(model) == ("a", "c")


def test_adapters_that_do_not_act_together_are_not_merged_together():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    adapt(model, LoRA(r=1, target_modules=["1"], modules_to_save=["0"]), "copy")
    adapt(model, LoRA(r=1, target_modules=["0.0"]), "inside")
    activate(model, "copy", "inside")
    with pytest.raises(ValueError, match=r"'0.0' is adapted inside a module that another .* trains as a copy"):
        Adapter(model, "inside").merge()


@torch.no_grad()
@pytest.mark.parametrize("method", [PromptTuning(2), BottleneckAdapter()])
def test_what_is_no_change_of_weights_says_so_by_the_methods_name(build, method):
    adapter = adapt(build("bert"), method)
    said = rf"^{type(method).__name__} is no change of weights, so it cannot be merged; export the adapter instead$"
    with pytest.raises(ValueError, match=said):
        adapter.merge()
    with pytest.raises(ValueError, match=said):
        adapter.merge_and_unload()


def test_originals_can_be_declined_and_then_the_base_is_gone(build, call, perturb):
    model = build("llama")
    adapter = adapt(model, LoRA(r=2, target_modules=["q_proj"]))
    perturb(adapter)
    adapted = call(model, "llama")
    adapter.merge(keep_originals=False)
    torch.testing.assert_close(call(model, "llama"), adapted, rtol=1e-4, atol=1e-5)
    assert model._modules["adapters"].originals == {}
    for call_it, name in (
        (adapter.unmerge, "unmerge"),
        (adapter.remove, "unmerge"),
        (lambda: adapter.disabled().__enter__(), "disabled"),
    ):
        with pytest.raises(RuntimeError, match=rf"{name}\(\): .* merged with keep_originals=False"):
            call_it()
    torch.testing.assert_close(call(model, "llama"), adapted, rtol=1e-4, atol=1e-5)
    plain = adapter.merge_and_unload()
    torch.testing.assert_close(call(plain, "llama"), adapted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_originals_can_be_dropped_later_but_not_under_another_merged_adapter(build, perturb):
    model = build("llama")
    for name in ("a", "b"):
        perturb(adapt(model, LoRA(r=2), name))
    activate(model, "a", "b")
    first, second = Adapter(model, "a"), Adapter(model, "b")
    first.merge()
    second.merge()
    merged = weights(model)
    for drop in (lambda: first.merge(keep_originals=False), lambda: second.merge(keep_originals=False)):
        with pytest.raises(ValueError, match=r"originals of the merged adapter '[ab]' wait for its unmerge"):
            drop()
    second.unmerge()
    first.merge(keep_originals=False)
    second.merge(keep_originals=False)
    for key, weight in weights(model).items():  # cast after each, so a float32 rounding more
        torch.testing.assert_close(weight, merged[key], rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="merged with keep_originals=False"):
        first.unmerge()


@torch.no_grad()
def test_the_plan_counts_the_originals(build):
    model = build("bert")
    adapter = adapt(model, LoRA(r=2, target_modules=["query"]))
    weight, bias = 2 * 32 * 32 * 4, 2 * 32 * 4
    assert (adapter.plan.merge_bytes, adapter.plan.originals_bytes) == (weight + bias, 0)
    assert "Merging keeps up to 8.4 kB of original weights on the CPU" in str(adapter.plan)
    adapter.merge()
    assert adapter.plan.merge_bytes == weight
    assert sum(p.numel() * 4 for p in model._modules["adapters"].originals.values()) == weight
    adapter.merge(keep_originals=False)
    assert adapter.plan.merge_bytes == 0
    assert adapt(build("bert"), BottleneckAdapter()).plan.merge_bytes == 0
    biases = adapt(build("bert"), Selective(parameter_types=["bias"]))
    assert biases.plan.originals_bytes == biases.plan.trainable_bytes > 0


@torch.no_grad()
@pytest.mark.parametrize("both_ends", [False, True])
def test_a_tied_weight_is_merged_at_the_ends_that_are_adapted_and_once_at_each(
    build, call, perturb, both_ends, tmp_path
):
    model = build("gpt2")
    weight = model.lm_head.weight
    assert weight is model.transformer.wte.weight
    before = weight.clone()
    targets = ["wte", "lm_head"] if both_ends else ["wte"]
    adapter = adapt(model, LoRA(r=2, target_modules=targets))
    perturb(adapter, 0.1)
    adapted = call(model, "gpt2")
    layers = adapter.tree.layers_by_module
    adapter.merge()
    torch.testing.assert_close(call(model, "gpt2"), adapted, rtol=1e-4, atol=1e-5)
    wte = layers["transformer.wte"].deltas(model.transformer.wte)["weight"]
    assert torch.equal(model.transformer.wte.weight, before + wte)
    head = layers["lm_head"].deltas(model.lm_head)["weight"] if both_ends else torch.zeros_like(before)
    assert torch.equal(model.lm_head.weight, before + head)
    adapter.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(call(model, "gpt2"), adapted)
    plain = adapter.merge_and_unload()
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(call(again, "gpt2"), adapted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tie_that_merging_does_not_touch_stays_one(build, perturb, tmp_path):
    model = build("gpt2")
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    save_merged(model, "default", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings
    assert adapter.merge_and_unload().config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


@torch.no_grad()
def test_a_merged_model_can_be_cast_copied_and_pickled_and_still_unmerged(build, call, perturb):
    model = build("llama")
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    base = weights(model)
    adapter.merge()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        Adapter(twin).unmerge()
        assert all(torch.equal(t, base[n]) for n, t in weights(twin).items())
    model.to(torch.bfloat16)
    adapter.unmerge()
    assert all(torch.equal(t, base[n].to(torch.bfloat16)) for n, t in weights(model).items())
    assert call(model, "llama").dtype == torch.bfloat16


def test_merged_weights_still_count_as_loaded_from_a_checkpoint(bert_folder):
    model = BertModel.from_pretrained(bert_folder)
    adapt(model, LoRA(r=2), "a").merge()
    second = adapt(model, LoRA(r=2), "b")
    assert second.tree.record.new == []
    assert second.tree.record.copies == []


@torch.no_grad()
def test_what_trains_in_place_and_what_is_merged_keep_off_each_other(build):
    model = build("llama")
    adapt(model, Selective(parameter_types=["weight"]), "weights")
    adapter = adapt(model, LoRA(r=2, target_modules=["q_proj"]), "lora")
    with pytest.raises(ValueError, match=r"q_proj.weight trains in place, so nothing can be merged into it"):
        adapter.merge()
    Adapter(model, "weights").remove()
    adapter.merge()
    with pytest.raises(ValueError, match=r"q_proj.weight' would train in place, but an adapter is merged into it"):
        adapt(model, Selective(parameter_types=["weight"]), "weights")


@torch.no_grad()
def test_weights_that_are_not_there_as_they_are_are_not_merged_into():
    offloaded = nn.Sequential(nn.Linear(4, 4))
    adapter = adapt(offloaded, LoRA(r=1))
    offloaded[0]._parameters["weight"] = nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    parametrized = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(parametrized[0], "weight", nn.Tanh())
    for other in (adapter, adapt(parametrized, LoRA(r=1))):
        with pytest.raises(ValueError, match=r"0.weight cannot be merged into: it is offloaded, quantized or computed"):
            other.merge()


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False])
def test_a_sum_beyond_the_range_of_the_base_is_refused_and_nothing_changes(keep):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    adapter = adapt(model, LoRA(r=1))
    adapter.tree.get_parameter("1.lora_B").fill_(1e6)
    before = weights(model)
    with pytest.raises(ValueError, match=r"merged 1.weight is not finite; the base is left as it is"):
        adapter.merge(keep_originals=keep)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
    assert active_adapters(model) == ("default",)


@torch.no_grad()
def test_a_float64_base_is_merged_in_float64(perturb):
    model = nn.Sequential(nn.Linear(4, 4)).double()
    weight = model[0].weight.clone()
    adapter = adapt(model, LoRA(r=1))
    perturb(adapter)
    delta = adapter.tree.layers_by_module["0"].deltas(model[0])["weight"]
    adapter.merge()
    assert torch.equal(model[0].weight, weight + delta.double())


@torch.no_grad()
@pytest.mark.parametrize(
    "inner", [LoRA(r=2), LoRA(r=2, lora_bias=True), IA3(target_modules=["0"]), OFT(oft_block_size=4)]
)
@pytest.mark.parametrize(
    "outer", [LoRA(r=2, use_dora=True), MiSS(r=4, init_weights="bat"), BOFT()], ids=["dora", "bat", "boft"]
)
def test_a_layer_that_reads_the_weight_gives_the_same_over_an_adapter_and_over_the_merged_one(outer, inner, perturb):
    model = nn.Sequential(nn.Linear(8, 12))
    for name, method in (("inner", inner), ("outer", outer)):
        perturb(adapt(model, method, name), 0.3)
    activate(model, "inner", "outer")
    x = torch.randn(3, 8)
    expected = model(x)
    for name in ("inner", "outer"):
        Adapter(model, name).merge()
        torch.testing.assert_close(model(x), expected)
    for name in ("outer", "inner"):
        Adapter(model, name).unmerge()
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(r=2), LoRA(r=2, use_dora=True), OFT(oft_block_size=4)])
def test_autocast_does_not_round_what_is_merged_inside_it(method, perturb):
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = adapt(model, method)
    perturb(adapter, 0.3)
    twin = copy.deepcopy(model)
    adapter.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Adapter(twin, "default").merge()
    assert torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
def test_on_a_gpu_the_originals_wait_on_the_cpu(build, perturb):
    model = build("gpt2").cuda()
    adapter = adapt(model, LoRA(r=2, target_modules=["c_attn", "wte"]))
    perturb(adapter)
    before = weights(model)
    adapter.merge()
    waiting = model._modules["adapters"].originals
    assert {k for k, p in waiting.items() if p.is_cuda} == {"transformer.wte.weight"}  # the head still runs with it
    adapter.unmerge()
    assert all(t.is_cuda and torch.equal(t, before[n]) for n, t in weights(model).items())


class _NormNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.head(self.body(x)))


@pytest.mark.parametrize("last", ["merge_and_unload", "remove", "remove merged"])
def test_running_statistics_of_copies_that_trained_go_into_the_merged_model_and_back(last):
    model = _NormNet()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(16, 8)
    with torch.no_grad():
        plain = model.eval()(x)
    adapter = adapt(model, LoRA(r=2, target_modules=["body"], modules_to_save=["head", "norm"]))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    model.train()
    for step in range(5):
        optimizer.zero_grad()
        model(3 + 2 * torch.randn(16, 8)).sub(step).pow(2).mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(x)
        assert not torch.allclose(trained, plain, atol=1e-2)
        adapter.merge()
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
        assert model.norm.num_batches_tracked == model.head[1].num_batches_tracked == 5
        with adapter.disabled():
            assert torch.equal(model(x), plain)
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
        adapter.unmerge()
        assert torch.equal(model(x), trained)
        for name, tensor in weights(model).items():
            assert torch.equal(tensor, base[name]), name
        with adapter.disabled():
            assert torch.equal(model(x), plain)
        if last == "merge_and_unload":
            torch.testing.assert_close(adapter.merge_and_unload()(x), trained, rtol=1e-5, atol=1e-5)
            assert type(model) is _NormNet
            assert model.state_dict().keys() == base.keys()
            return
        if last == "remove merged":
            adapter.merge()
        adapter.remove()
        assert torch.equal(model(x), plain)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("way", ["memory", "file"])
def test_a_combination_is_merged_into_a_plain_model_that_can_be_saved(build, call, perturb, tmp_path, way):
    model = build("llama")
    for name in ("a", "b"):
        perturb(adapt(model, LoRA(r=2), name))
    both = combine(model, ["a", "b"], [0.7, 0.3], "both")
    adapted = call(model, "llama")
    if way == "memory":
        plain = both.merge_and_unload()
        assert not hasattr(plain, "adapters")
        plain.save_pretrained(tmp_path / "merged")
    else:
        save_merged(model, "both", tmp_path / "merged")
        assert active_adapters(model) == ("both",)
        assert torch.equal(call(model, "llama"), adapted)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(call(again, "llama"), adapted, rtol=1e-4, atol=1e-5)


def test_another_adapter_that_acts_is_refused_by_name_and_may_be_merged_for_good_first(build, call, perturb, tmp_path):
    model = build("llama")
    first, second = (adapt(model, LoRA(r=2), name) for name in ("a", "b"))
    perturb(first)
    perturb(second)
    activate(model, "a", "b")
    adapted = call(model, "llama")

    def refused(how):
        before = weights(model)
        for unload in (second.merge_and_unload, lambda: save_merged(model, "b", tmp_path / "merged")):
            with pytest.raises(ValueError, match=rf"the adapter 'a' {how}.*merge\(keep_originals=False\)"):
                unload()
        assert all(torch.equal(t, before[n]) for n, t in weights(model).items())
        assert not (tmp_path / "merged").exists()

    refused("is active too; leave it out by activate")
    first.merge()
    refused("is merged and its originals wait; unmerge")
    first.merge(keep_originals=False)
    plain = second.merge_and_unload()
    assert not hasattr(plain, "adapters")
    torch.testing.assert_close(call(plain, "llama"), adapted, rtol=1e-4, atol=1e-5)


def test_what_trains_in_place_acts_though_it_is_not_active_and_is_not_dropped(build):
    model = build("llama")
    adapt(model, Selective(parameter_types=["norm"]), "norms")
    said = r"'norms' trains 'model\..*' in place, so it acts though it is not active; remove"
    with pytest.raises(ValueError, match=said):
        adapt(model, LoRA(r=2), "a").merge_and_unload()


@pytest.mark.parametrize(
    ("first", "way"),
    [
        (LoRA(r=2, target_modules=["c_attn"]), "fold"),
        (LoRA(r=2, target_modules=["c_attn"]), "merge for good"),
        (LoRA(r=2, target_modules=["c_attn"]), "drop originals later"),
        (LoRA(r=2, target_modules=["lm_head"]), "fold"),  # which unties it from the embedding
        (Selective(parameter_types=["norm"]), "fold"),
    ],
)
def test_an_adapter_saved_after_another_was_merged_for_good_belongs_to_the_merged_model(
    build, call, perturb, tmp_path, first, way
):
    model = build("gpt2")
    adapter = adapt(model, first, "first")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    second = adapt(model, LoRA(r=2, target_modules=["c_fc"]), "second")
    perturb(second)
    activate(model, "first", "second")
    if way == "fold":
        fold(model, "first")
    elif way == "merge for good":
        adapter.merge(keep_originals=False)
    else:
        adapter.merge()
        adapter.merge(keep_originals=False)
    adapted = call(model, "gpt2")
    second.save(tmp_path / "second")
    second.remove()
    if way != "fold":
        fold(model, "first")
    assert not hasattr(model, "adapters")
    load_adapter(model, tmp_path / "second")
    assert torch.equal(call(model, "gpt2"), adapted)
    with pytest.raises(ValueError, match="on another base"):
        load_adapter(build("gpt2"), tmp_path / "second")
