"""LoRA+: who learns how fast."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import LoRA, PeftModule, PromptTuning, adapt, lora_plus_groups
from lightning_peft.tasks.optimization import make_optimizer


@pytest.mark.filterwarnings("ignore")  # what peft and transformers warn of each other is not ours to mend
def test_the_groups_are_those_of_peft(build):
    """The same parameters at the same rates as peft's own optimizer for the same adapter."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    targets = r".*(query|value|word_embeddings)"
    model = build("bert")
    adapt(model, LoRA(r=2, target_modules=targets, modules_to_save=["classifier"]))
    ours = {id(p): g["lr"] for g in lora_plus_groups(model, 1e-3, 8) for p in g["params"]}
    by_name = {n.removeprefix("adapters.default."): ours[id(p)] for n, p in model.named_parameters() if id(p) in ours}
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(build("bert"), config)
    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    rates = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
    named = {n: rates[id(p)] for n, p in wrapped.named_parameters() if id(p) in rates}
    clean = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): rate
        for n, rate in named.items()
    }
    clean = {n.removesuffix(".weight") if "lora" in n else n: rate for n, rate in clean.items()}
    assert by_name == clean


def test_b_moves_so_many_times_as_far_in_adams_first_step(build, call, perturb):
    model = build("bert")
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    optimizer = make_optimizer(model, {"name": "Adam", "lr": None, "loraplus_lr_ratio": 4}, 1e-3)
    call(model, "bert").pow(2).mean().backward()
    optimizer.step()
    moved = {n: (t - before[n]).abs().median() for n, t in adapter.state_dict().items()}
    a, b = (torch.stack([m for n, m in moved.items() if n.endswith(f"lora_{x}")]).median() for x in "AB")
    torch.testing.assert_close(b / a, torch.tensor(4.0), rtol=1e-3, atol=0)


def test_a_ratio_without_lora_or_below_one_is_refused(build):
    model = build("llama")
    adapt(model, PromptTuning(4))
    with pytest.raises(ValueError, match="nothing that trains is LoRA's B"):
        lora_plus_groups(model, 1e-3)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio must be 1 or more, but got 0\.5"):
        PeftModule("x", LoRA(), optimizer={"loraplus_lr_ratio": 0.5})
