"""Heads that the base's checkpoint lacked train in full, whatever the method targets."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import IA3, AdaLoRA, LoRA, VeRA, adapt, load_adapter


@pytest.fixture
def fresh(build, tmp_path):
    """Makes a language model whose trunk is loaded and whose head is new."""
    from transformers import LlamaForCausalLM

    build("llama").model.save_pretrained(tmp_path / "trunk")

    def make(seed: int = 0):
        torch.manual_seed(seed)
        return LlamaForCausalLM.from_pretrained(tmp_path / "trunk").eval()

    return make


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2, target_modules=["lm_head", "q_proj"]),
        LoRA(r=2, target_modules=["lm_head"]),
        AdaLoRA(target_r=1, init_r=2, target_modules=["lm_head", "q_proj"]),
        VeRA(r=2, target_modules=["lm_head", "q_proj"]),
        VeRA(r=2, target_modules=["lm_head"]),
        IA3(target_modules=["lm_head", "q_proj"], feedforward_modules=[]),
    ],
    ids=lambda m: f"{type(m).__name__}-{len(m.target_modules)}",
)
def test_a_new_head_trains_in_full_though_the_method_targets_it(fresh, call, tmp_path, method):
    model = fresh()
    adapter = adapt(model, method)
    assert adapter.tree.record.copies == ["lm_head"]
    assert "lm_head" not in adapter.tree.record.layers
    assert {n for n, _ in adapter.tree.named_parameters() if n.startswith("lm_head")} == {"lm_head.weight"}
    assert [r.what for r in adapter.plan.rows if r.place == "lm_head"] == ["new, in full"]
    assert "trained in full and saved without being asked for: lm_head.weight" in str(adapter.plan)
    before = adapter.tree.get_parameter("lm_head.weight").detach().clone()
    call(model, "llama").pow(2).mean().backward()
    torch.optim.AdamW(adapter.parameters(), lr=1e-2).step()
    assert not torch.equal(adapter.tree.get_parameter("lm_head.weight"), before)
    adapter.save(tmp_path / "adapter")
    again = fresh(seed=1)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(call(again, "llama"), call(model, "llama"))


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_was_dropped_on_a_new_head_as_a_saved_module(fresh, call, tmp_path):
    from peft import PeftModel

    model = fresh()
    adapter = adapt(model, LoRA(r=2, target_modules=["lm_head", "q_proj"]))
    torch.nn.init.normal_(adapter.tree.get_parameter("lm_head.weight"))
    adapter.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(fresh(seed=1), tmp_path / "adapter").eval()
    torch.testing.assert_close(call(theirs, "llama"), call(model, "llama"), rtol=1e-5, atol=1e-5)
