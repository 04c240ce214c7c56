"""Blocks in which a model is its base: several at once, in one thread or in several."""

from __future__ import annotations

import copy
import pickle
from threading import Barrier, Thread

import pytest
import torch

from lightning_peft import LoRA, Selective, active_adapters, adapt


def _adapted(build, method, merged):
    model = build("llama")
    adapter = adapt(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if merged:
        adapter.merge()
    return model, adapter


KINDS = pytest.mark.parametrize(
    ("method", "merged"), [(LoRA(r=2), False), (LoRA(r=2), True), (Selective(parameter_types=["norm"]), False)]
)


@KINDS
@torch.no_grad()
def test_blocks_that_overlap_in_two_threads_leave_the_adapted_model(build, call, method, merged):
    model, adapter = _adapted(build, method, merged)
    base, adapted, active = call(build("llama"), "llama"), call(model, "llama"), active_adapters(model)
    turn = Barrier(2, timeout=20)
    seen = {}

    @torch.no_grad()
    def second():
        turn.wait()
        with adapter.disabled():
            turn.wait()
            turn.wait()  # the first block ends in between
            seen["second"] = call(model, "llama")
        seen["after"] = call(model, "llama")

    thread = Thread(target=second)
    thread.start()
    with adapter.disabled():
        turn.wait()
        turn.wait()
        seen["first"] = call(model, "llama")
    turn.wait()
    thread.join(20)
    assert torch.equal(seen["first"], base)
    assert torch.equal(seen["second"], base)
    assert torch.equal(seen["after"], adapted)
    assert torch.equal(call(model, "llama"), adapted)
    assert active_adapters(model) == active


@KINDS
@torch.no_grad()
def test_blocks_lie_in_each_other_and_an_error_leaves_only_its_own(build, call, method, merged):
    model, adapter = _adapted(build, method, merged)
    base, adapted = call(build("llama"), "llama"), call(model, "llama")
    with adapter.disabled():
        with pytest.raises(KeyError), adapter.disabled():
            raise KeyError
        assert torch.equal(call(model, "llama"), base)
    assert torch.equal(call(model, "llama"), adapted)


@torch.no_grad()
def test_a_copy_that_is_made_inside_a_block_is_in_no_block_and_has_blocks_of_its_own(build, call):
    model, adapter = _adapted(build, LoRA(r=2), False)
    base, adapted = call(build("llama"), "llama"), call(model, "llama")
    with adapter.disabled():
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        twin._modules["adapters"].switch.active = ("default",)
        assert torch.equal(call(twin, "llama"), adapted)
        with type(adapter)(twin).disabled():
            assert torch.equal(call(twin, "llama"), base)
            assert torch.equal(call(model, "llama"), adapted)


def test_a_block_that_cannot_begin_leaves_the_next_one_free_to(build, call):
    model = build("llama")
    adapter = adapt(model, Selective(parameter_types=["norm"], keep_originals=False))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"disabled\(\): .*keep_originals=False"), adapter.disabled():
            pass


def test_what_was_trained_in_place_is_swapped_on_the_device_that_the_model_has_moved_to(build):
    model = build("bert")
    adapter = adapt(model, Selective(parameter_types=["bias"]))
    model.to("meta")
    with adapter.disabled():
        assert {p.device.type for p in model.parameters()} == {"meta"}
    adapter.remove()
    assert {p.device.type for p in model.parameters()} == {"meta"}
