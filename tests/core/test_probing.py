"""Two ways through a model compared, and everything as it was before."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import LoRA, adapt
from lightning_peft.core.probing import agree, probing, states_of


def test_one_number_for_each_row_is_compared_too():
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.1]])
    assert agree(one, one)
    assert not agree(one, other)
    assert not agree(one, one.T)
    assert not agree(one * torch.nan, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_act_within_and_are_themselves_afterwards(build, dtype):
    model = build("llama").to(dtype).train()
    adapter = adapt(model, LoRA(r=4))
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    loss = model(input_ids=ids, labels=ids).loss  # its graph waits while something is tried
    torch.manual_seed(0)
    with probing(model):
        assert not model.training
        assert all((v != before[k]).any() for k, v in adapter.state_dict().items())
        assert model(input_ids=ids).logits.isfinite().all()
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2))
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    assert model.training
    loss.backward()


def test_an_adapter_is_told_from_another_of_the_same_name(build):
    model = build("llama")
    assert states_of(model) == ()
    seen = set()
    for _ in range(3):
        adapter = adapt(model, LoRA(r=2))
        assert states_of(model) == states_of(model)
        seen.add(states_of(model))
        adapter.remove()
    assert len(seen) == 3
