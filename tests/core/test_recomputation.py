"""Activation checkpointing runs a forward again in the backward pass: with other adapters that is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_peft import (
    IA3,
    Adapter,
    BottleneckAdapter,
    DeepPrompt,
    LlamaAdapter,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    PTuning,
    activate,
    adapt,
    adapter_names,
)
from lightning_peft.core import routing

METHODS = {
    "lora": lambda: LoRA(r=2),
    "ia3": lambda: IA3(),
    "dora": lambda: LoRA(r=2, use_dora=True),
    "bottleneck": lambda: BottleneckAdapter(reduction_factor=4),
    "saved module": lambda: LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompt": lambda: PromptTuning(3),
    "p-tuning": lambda: PTuning(3),
    "prefix": lambda: PrefixTuning(3),
    "deep prompt": lambda: DeepPrompt(num_virtual_tokens=3),
    "gated": lambda: LlamaAdapter(3),
    "reft": lambda: LoReFT(r=2),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def layers(model):
    """The model's own checkpointing, of each layer by itself."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return lambda names=None: model(input_ids=IDS, use_cache=False).logits.pow(2).mean()


def whole(model):
    """A checkpoint around the model."""

    def run():
        output = checkpoint(lambda ids: model(input_ids=ids, use_cache=False), IDS, use_reentrant=False)
        return output.logits.pow(2).mean()

    return run


AROUND = {"layers": layers, "whole": whole}


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def pair(build, perturb, method):
    model = build("llama")
    for name, by in (("a", 0.1), ("b", -0.2)):
        perturb(adapt(model, METHODS[method](), name), by)
    activate(model, "a")
    return model


def anew(model, perturb):
    """Another adapter of the same name and method."""
    method = Adapter(model, "a").method
    Adapter(model, "a").remove()
    perturb(adapt(model, method, "a"), 0.3)


CHANGES = {
    "another": lambda model, perturb: activate(model, "b"),
    "none": lambda model, perturb: activate(model),
    "both": lambda model, perturb: activate(model, "a", "b"),
    "one of the same name": anew,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("method", METHODS)
def test_a_change_between_forward_and_backward_raises_or_leaves_the_gradients_right(
    build, perturb, method, around, change
):
    """Right where nothing of the adapter lies inside what is run again, as with a prompt before the layers."""
    model = pair(build, perturb, method)
    run = AROUND[around](model)
    run().backward()
    expected = gradients(model)
    assert any(n.startswith("adapters.a.") and g.abs().sum() > 0 for n, g in expected.items())
    trained = dict(model.named_parameters())
    loss = run()
    CHANGES[change](model, perturb)
    try:
        loss.backward()
    except RuntimeError as error:
        told = ("the gradients would be wrong", "ran without the model's forward around it")
        assert isinstance(error, CheckpointError) or any(part in str(error) for part in told)  # noqa: PT017
        return
    assert around == "layers"
    assert method in ("prompt", "p-tuning")
    for name, gradient in expected.items():
        torch.testing.assert_close(trained[name].grad, gradient)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
@pytest.mark.parametrize("around", AROUND)
def test_a_backward_outside_the_block_of_rows_raises(build, perturb, around):
    model = pair(build, perturb, "lora")
    run = AROUND[around](model)
    with adapter_names(model, ["a", "b"]):
        loss, other = run(), run()
    with adapter_names(model, ["b", "a"]), pytest.raises(RuntimeError, match="the gradients would be wrong"):
        loss.backward()
    with pytest.raises(RuntimeError):
        other.backward()


def test_every_output_is_tied_to_the_adapters_it_was_made_with(perturb):
    """Whichever of them the loss is made of."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})

        def forward(self, x):
            return {"first": self.inner["first"](x), "rest": (x, [self.inner["second"](x)])}

    model = Two()
    for name in "ab":
        perturb(adapt(model, LoRA(r=2, modules_to_save=["inner.first"], target_modules=["inner.second"]), name))
    x = torch.ones(2, 4, requires_grad=True)
    for pick in (lambda out: out["first"], lambda out: out["rest"][1][0]):
        activate(model, "a")
        loss = pick(checkpoint(model, x, use_reentrant=False)).sum()
        activate(model, "b")
        with pytest.raises(RuntimeError, match="the gradients would be wrong"):
            loss.backward()


def test_what_is_remembered_for_errors_does_not_grow_with_the_run(monkeypatch):
    monkeypatch.setattr(routing, "_MOST_SPOKEN", 50)
    model = nn.Sequential(nn.Linear(4, 4))
    for number in range(12):
        adapt(model, LoRA(r=1), f"adapter-{number}")
    x = torch.ones(12, 4, requires_grad=True)
    for number in range(120):
        names = [f"adapter-{(number >> row) % 2 + row % 6}" for row in range(12)]
        with adapter_names(model, names):
            checkpoint(model, x, use_reentrant=False)
    assert 0 < len(routing._spoken) <= routing._MOST_SPOKEN
