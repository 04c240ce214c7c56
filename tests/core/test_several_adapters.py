"""Several adapters on one model: which run, which train, and that the one does not touch the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import Adapter, LoRA, Selective, activate, active_adapters, adapt


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.fixture
def pair(build, perturb):
    """A Llama with two perturbed adapters, ``a`` and ``b``."""
    model = build("llama")
    perturb(adapt(model, LoRA(r=2, lora_alpha=3), "a"), 0.1)
    perturb(adapt(model, LoRA(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]), "b"), 0.2)
    return model


@torch.no_grad()
def test_one_several_or_no_adapters_are_active(pair, call, build, perturb):
    assert active_adapters(pair) == ("b",)
    alone = {}
    for name in ("a", "b"):
        activate(pair, name)
        assert active_adapters(pair) == (name,)
        alone[name] = call(pair, "llama")
    activate(pair)
    assert active_adapters(pair) == ()
    assert torch.equal(call(pair, "llama"), call(build("llama"), "llama"))
    activate(pair, "a", "b")
    both = call(pair, "llama")
    merged = build("llama")
    for name in ("a", "b"):
        adapter = adapt(merged, Adapter(pair, name).method, name)
        adapter.tree.load_state_dict(Adapter(pair, name).tree.state_dict())
        adapter.merge_and_unload()
    torch.testing.assert_close(both, call(merged, "llama"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both, alone["a"], atol=1e-3)
    assert not torch.allclose(both, alone["b"], atol=1e-3)
    Adapter(pair, "a").activate()
    assert torch.equal(call(pair, "llama"), alone["a"])


@torch.no_grad()
def test_what_cannot_be_activated_is_refused_by_name_and_nothing_changes(pair, build):
    activate(pair, "a")
    with pytest.raises(ValueError, match="has no adapter 'aa'; did you mean 'a'"):
        activate(pair, "b", "aa")
    with pytest.raises(ValueError, match="names the adapter 'b' twice"):
        activate(pair, "b", "b")
    assert active_adapters(pair) == ("a",)
    handle = Adapter(pair, "a")
    handle.merge()
    for merged in (lambda: activate(pair, "a"), handle.activate):
        with pytest.raises(ValueError, match=r"'a' is merged into the weights.*unmerge\(\) it first"):
            merged()
    assert active_adapters(pair) == ()
    handle.remove()
    with pytest.raises(ValueError, match="has no adapter 'a'"):
        activate(pair, "a")
    with pytest.raises(RuntimeError, match="'a' has been removed"):
        handle.activate()
    with pytest.raises(RuntimeError, match="'a' has been removed"):
        handle.requires_grad_(False)
    for ask in (activate, active_adapters):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is not adapted; adapt\(\) it first"):
            ask(build("llama"))
        with pytest.raises(ValueError, match="Sequential is not adapted; its submodule '0' is, so pass that"):
            ask(nn.Sequential(pair))


def test_switching_never_touches_what_trains(pair):
    before = flags(pair)
    activate(pair, "a")
    activate(pair)
    activate(pair, "b", "a")
    with Adapter(pair, "a").disabled():
        assert flags(pair) == before
    assert flags(pair) == before


def test_one_adapter_trains_while_another_runs(pair, call):
    first, second = Adapter(pair, "a"), Adapter(pair, "b")
    assert first.requires_grad_(False) is first
    assert first.parameters() == []
    activate(pair, "a", "b")
    start = {n: t.clone() for n, t in first.state_dict().items()}
    moving = {n: t.clone() for n, t in second.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in pair.parameters() if p.requires_grad], lr=1e-2)
    call(pair.train(), "llama").pow(2).mean().backward()
    assert {id(p) for p in pair.parameters() if p.grad is not None} == {id(p) for p in second.parameters()}
    optimizer.step()
    assert all(torch.equal(t, start[n]) for n, t in first.state_dict().items())
    assert all(not torch.equal(t, moving[n]) for n, t in second.state_dict().items())
    with first.disabled():
        call(pair, "llama")
    first.requires_grad_()
    assert all(p.requires_grad for p in first.tree.parameters())


def test_adding_and_removing_adapters_leaves_the_others_at_rest_or_training(pair):
    first, second = Adapter(pair, "a"), Adapter(pair, "b")
    first.requires_grad_(False)
    third = adapt(pair, Selective(parameter_types=["norm"]), "norms")
    third.requires_grad_(False)
    fourth = adapt(pair, LoRA(r=1), "fourth")
    assert first.parameters() == third.parameters() == []
    assert second.parameters()
    assert fourth.parameters()
    fourth.remove()
    assert first.parameters() == third.parameters() == []
    assert all(p.requires_grad for p in second.tree.parameters())
    third.requires_grad_()
    assert len(third.parameters()) == len(third.tree.record.in_place)
    base = {n for n, p in pair.named_parameters() if p.requires_grad and not n.startswith("adapters.")}
    assert base == set(third.tree.record.in_place)
    third.remove()
    assert not any(p.requires_grad for n, p in pair.named_parameters() if not n.startswith("adapters."))


def test_a_parameter_that_was_frozen_by_hand_stays_frozen_after_a_rest():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapter = adapt(model, LoRA(r=2))
    adapter.tree.get_parameter("0.lora_A").requires_grad_(False)
    for trains in (False, False, True, True):
        adapter.requires_grad_(trains)
    assert {n for n, p in adapter.tree.named_parameters() if not p.requires_grad} == {"0.lora_A"}


def test_batch_norm_statistics_stand_still_while_their_adapter_rests(build, call):
    model = build("convnet").train()
    adapter = adapt(model, Selective(parameter_types=["norm"]))
    adapter.requires_grad_(False)
    before = model.norm.running_mean.clone()
    call(model.train(), "convnet")
    assert torch.equal(model.norm.running_mean, before)
    adapter.requires_grad_()
    call(model, "convnet")
    assert not torch.equal(model.norm.running_mean, before)
