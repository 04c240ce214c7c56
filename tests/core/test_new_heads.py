"""Heads that the base's checkpoint lacked train in full, whatever the method targets."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import IA3, AdaLoRA, LoRA, PeftCallback, VeRA, adapt, load_adapter, load_from_checkpoint


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


def test_an_adapter_that_is_loaded_onto_a_new_head_keeps_the_method_it_was_made_by(fresh, call, tmp_path, perturb):
    method = LoRA(r=2, target_modules=["q_proj"])
    model = fresh()
    adapter = adapt(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "first")
    loaded = load_adapter(fresh(seed=1), tmp_path / "first")
    assert loaded.method == method
    assert torch.equal(call(loaded.model, "llama"), call(model, "llama"))
    loaded.save(tmp_path / "second")
    for name in ("lightning_peft.json", "adapter_config.json"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()


def test_a_callback_goes_on_with_an_adapter_that_was_loaded_onto_a_new_head(fresh, tmp_path, trainer):
    class Net(L.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = fresh(seed)

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    method = LoRA(r=2, target_modules=["q_proj"])
    adapt(fresh(), method).save(tmp_path / "adapter")
    net = Net(seed=1)
    load_adapter(net.model, tmp_path / "adapter")
    ids = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(0))
    t = trainer(PeftCallback(method, "model"))
    t.fit(net, DataLoader(ids, batch_size=2))
    t.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Net, tmp_path / "a.ckpt", seed=2)
    assert torch.equal(again.model(ids).logits, net.model.eval()(ids).logits)


def test_a_base_whose_head_is_its_own_needs_the_copy_named(fresh, call, tmp_path, perturb):
    from transformers import LlamaForCausalLM

    adapter = adapt(fresh(), LoRA(r=2, target_modules=["q_proj"]))
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    fresh().save_pretrained(tmp_path / "whole")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()
    loaded = load_adapter(whole, tmp_path / "adapter")
    assert loaded.method == LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert torch.equal(call(whole, "llama"), call(adapter.model, "llama"))
    (tmp_path / "adapter" / "lightning_peft.json").unlink()  # as peft writes it
    foreign = load_adapter(fresh(seed=1), tmp_path / "adapter")
    assert foreign.method.modules_to_save == ["lm_head"]
    assert foreign.save(tmp_path / "again")
    assert load_adapter(fresh(seed=2), tmp_path / "again").method == foreign.method
