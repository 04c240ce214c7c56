"""AdaLoRA's schedule: the same triplets stay as in PEFT, and the ranks end where they should."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import AdaLoRA, adapt, load_adapter
from lightning_peft.methods.adalora import orthogonality

OPTIONS = {"target_r": 2, "init_r": 4, "lora_alpha": 6, "tinit": 2, "tfinal": 3, "deltaT": 2}
TOTAL = 10


def _step(model, optimizer, adapter, call, step):
    call(model, "llama").pow(2).mean().backward()
    adapter.before_step(step, TOTAL)
    optimizer.step()
    adapter.after_step(step, TOTAL)
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_with_the_schedule_are_those_of_peft(build, call, perturb, tmp_path):
    peft = pytest.importorskip("peft")
    ours = build("llama")
    adapter = adapt(ours, AdaLoRA(**OPTIONS))
    perturb(adapter)
    adapter.save(tmp_path / "a")
    config = peft.AdaLoraConfig.from_pretrained(tmp_path / "a")
    config.total_step, config.inference_mode = TOTAL, False
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "a", config=config, is_trainable=True).double()
    ours.double()
    for tensor in [*adapter.parameters(), *adapter.tree.buffers()]:
        tensor.data = tensor.data.double()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    one, other = torch.optim.AdamW(adapter.parameters(), lr=1e-2), torch.optim.AdamW(trained, lr=1e-2)
    for step in range(1, TOTAL + 1):
        _step(ours, one, adapter, call, step)
        factors = [p if "lora_A" in n else p.T for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        (call(theirs, "llama").pow(2).mean() + 0.5 * orthogonality(factors)).backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        other.zero_grad()
        gone = [int((layer.lora_E == 0).sum()) for layer in adapter.tree.layers_by_module.values()]
        # the first choice is the first even step after tinit; between two of them Adam moves zeros on
        assert (sum(gone) > 0) == (step in (4, 6) or step >= TOTAL - 3)
    state = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    for key, tensor in adapter.method.to_peft(adapter.state_dict()).items():
        torch.testing.assert_close(tensor, state[f"base_model.model.{key}"].data, rtol=1e-8, atol=1e-8)
    ranks = [int((layer.lora_E != 0).sum()) for layer in adapter.tree.layers_by_module.values()]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1

    theirs.float().save_pretrained(tmp_path / "pruned")
    fresh = build("llama")
    loaded = load_adapter(fresh, tmp_path / "pruned")
    assert sum(len(layer.lora_E) for layer in loaded.tree.layers_by_module.values()) == sum(ranks)
    with torch.no_grad():
        torch.testing.assert_close(call(fresh, "llama"), call(theirs.eval(), "llama"), rtol=1e-5, atol=1e-6)


def test_a_schedule_that_does_not_fit_the_training_is_an_error_at_its_first_step(build, call):
    model = build("llama")
    adapter = adapt(model, AdaLoRA(tinit=6, tfinal=4))
    call(model, "llama").sum().backward()
    with pytest.raises(ValueError, match="tinit=6 and tfinal=4 leave none of the 10 steps"):
        adapter.before_step(1, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_r": 4}, "init_r must be target_r"),
        ({"beta1": 1.0}, "beta1 must lie between 0 and 1"),
        ({"deltaT": 0}, "deltaT must be 1 or more"),
        ({"total_step": 3, "tinit": 3}, "leave none of the 3 steps"),
    ],
)
def test_a_wrong_number_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        AdaLoRA(**options)


def test_a_pattern_for_no_target_names_the_nearest(build):
    with pytest.raises(ValueError, match="is no target module; did you mean"):
        adapt(build("llama"), AdaLoRA(rank_pattern={"model.layers.0.self_attn.q_porj": [True]}))


def test_gradients_that_are_gone_are_missed_where_the_first_choice_is_made(build, call):
    model = build("llama")
    adapter = adapt(model, AdaLoRA(target_r=2, init_r=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    call(model, "llama").pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"call after_step between optimizer.step\(\) and zero_grad\(\)"):
        adapter.after_step(1, TOTAL)


def test_an_adapter_that_rests_is_left_as_it_is(build):
    adapter = adapt(build("llama"), AdaLoRA(target_r=2, init_r=4))
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    adapter.requires_grad_(False)
    adapter.before_step(5, TOTAL)
    adapter.after_step(5, TOTAL)
    assert all(torch.equal(t, before[n]) for n, t in adapter.state_dict().items())
