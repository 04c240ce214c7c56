"""What must hold for every method on every model that it works on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lightning_peft as lp
from lightning_peft import Adapter, load_adapter
from tests.method_table import CASES, IDS, TABLE, shown_data

pytestmark = pytest.mark.parametrize(("row", "name"), CASES, ids=IDS)


def adapt(model, method, name="default"):
    return shown_data(lp.adapt(model, method, name))


def _train(model, name, adapter, call, steps=3):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        call(model, name, rows=3).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def test_an_adapted_model_starts_as_the_base(row, name, build, call):
    model = build(name)
    base = call(model, name)
    adapt(model, row.make())
    assert torch.equal(call(model, name), base) == row.identity


def test_the_base_keeps_its_names_and_its_ties(row, name, build):
    model = build(name)
    names = list(model.state_dict())
    owners = [id(p) for p in model.parameters()]
    adapt(model, row.make())
    assert [n for n in model.state_dict() if not n.startswith("adapters.")] == names
    assert [id(p) for n, p in model.named_parameters() if not n.startswith("adapters.")] == owners


def test_training_moves_what_trains_and_leaves_the_rest_to_the_bit(row, name, build, call):
    model = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = adapt(model, row.make())
    start = {n: t.clone() for n, t in adapter.state_dict().items()}
    _train(model, name, adapter, call)
    trained = set(adapter.state_dict())
    moved = {n for n, t in model.state_dict().items() if n in before and not torch.equal(t, before[n])}
    shared = {n for n, p in model.named_parameters(remove_duplicate=False) if any(p is q for q in adapter.parameters())}
    statistics = {n for n in before if "running_" in n or "num_batches" in n}
    assert moved - shared <= (statistics if row.name in ("full", "norm", "bitfit") else set())
    assert any(not torch.equal(adapter.state_dict()[n], start[n]) for n in trained)


def test_everything_that_trains_gets_a_gradient_and_nothing_else(row, name, build, call, perturb):
    model = build(name)
    adapter = adapt(model, row.make())
    perturb(adapter)
    call(model.train(), name, rows=3).float().pow(2).mean().backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in adapter.parameters()}
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@torch.no_grad()
def test_disabling_gives_the_base_and_enabling_the_adapter_again(row, name, build, call, perturb):
    model = build(name)
    base = call(model, name)
    adapter = adapt(model, row.make())
    flags = [p.requires_grad for p in model.parameters()]
    perturb(adapter)
    adapted = call(model, name)
    assert not torch.equal(adapted, base)
    with adapter.disabled():
        assert torch.equal(call(model, name), base)
    assert torch.equal(call(model, name), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags


@torch.no_grad()
def test_removing_gives_back_the_model_as_it_was(row, name, build, call, perturb):
    model = build(name)
    base, state = call(model, name), {n: t.clone() for n, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter = adapt(model, row.make())
    perturb(adapter)
    assert adapter.remove() is model
    assert torch.equal(call(model, name), base)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="has been removed"):
        adapter.tree  # noqa: B018


@torch.no_grad()
def test_a_saved_adapter_gives_the_same_output_in_a_fresh_base(row, name, build, call, perturb, tmp_path):
    model = build(name)
    adapter = adapt(model, row.make())
    perturb(adapter)
    adapter.save(tmp_path / "a")
    fresh = build(name)
    torch.manual_seed(99)
    loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(call(fresh, name), call(model, name))
    assert set(loaded.state_dict()) == set(adapter.state_dict())
    assert loaded.method.learning_rate == adapter.method.learning_rate


@torch.no_grad()
def test_copies_and_pickles_have_layers_of_their_own(row, name, build, call, perturb):
    model = build(name)
    adapter = adapt(model, row.make())
    perturb(adapter)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = call(model, name)
        assert torch.equal(call(twin, name), expected)
        perturb(Adapter(twin))
        assert torch.equal(call(model, name), expected)
        assert not torch.equal(call(twin, name), expected)


@torch.no_grad()
def test_merging_changes_nothing_and_unmerging_restores_the_base_to_the_bit(row, name, build, call, perturb):
    model = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = adapt(model, row.make())
    perturb(adapter)
    adapted = call(model, name)
    if not row.mergeable:
        with pytest.raises(ValueError, match="cannot be merged"):
            adapter.merge()
        assert torch.equal(call(model, name), adapted)
        return
    in_place = {n: t.clone() for n, t in model.state_dict().items() if n in before}
    for _ in range(2):
        adapter.merge()
    # one float32 addition to each weight in another order than x W + x D
    torch.testing.assert_close(call(model, name), adapted, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        adapter.unmerge()
    assert torch.equal(call(model, name), adapted)
    assert all(torch.equal(t, in_place[n]) for n, t in model.state_dict().items() if n in before)


@torch.no_grad()
def test_merge_and_unload_leaves_a_plain_model(row, name, build, call, perturb):
    if not row.mergeable:
        pytest.skip("this method cannot be merged")
    model = build(name)
    classes = [type(m) for m in model.modules()]
    adapter = adapt(model, row.make())
    perturb(adapter)
    adapted = call(model, name)
    plain = adapter.merge_and_unload()
    assert [type(m) for m in plain.modules()] == classes
    torch.testing.assert_close(call(plain, name), adapted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_casting_the_base_leaves_what_trains_in_float32(row, name, build, call, perturb):
    model = build(name)
    adapter = adapt(model, row.make())
    perturb(adapter)
    values = {n: t.clone() for n, t in adapter.state_dict().items()}
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(torch.equal(t, values[n]) for n, t in adapter.state_dict().items() if t.is_floating_point())
    if name not in ("convnet", "encoder"):
        assert call(model, name).dtype == torch.bfloat16
        assert torch.isfinite(call(model, name)).all()


def test_two_adapters_each_give_what_they_give_alone(row, name, build, call, perturb):
    alone = build(name)
    torch.manual_seed(7)
    perturb(adapt(alone, row.make()), 0.1)
    model = build(name)
    first = TABLE[0].make() if name not in ("convnet", "encoder") else TABLE[2].make()
    perturb(adapt(model, first, "first"))
    with_first = call(model, name)
    torch.manual_seed(7)
    second = adapt(model, row.make(), "second")
    perturb(second, 0.1)
    if not (row.name == "lora_rs_bias" or second.tree.record.in_place):
        Adapter(model, "first").activate()
        assert torch.equal(call(model, name), with_first)
        second.activate()
        torch.testing.assert_close(call(model, name), call(alone, name))
    second.remove()
    Adapter(model, "first").activate()
    torch.testing.assert_close(call(model, name), with_first)
