"""The head and the loss on the tokens that count: the model's own logits and gradients, with none of the others."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from lightning_peft import LoRA, PromptTuning, Selective, TrainableTokens, adapt
from lightning_peft.core.adapters import adapters_of
from lightning_peft.tasks.counted import counted

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0}
KINDS = {
    "Llama": (LLAMA_LIKE, "nothing"),
    "Qwen3": ({**LLAMA_LIKE, "head_dim": 8}, "nothing"),
    "Gemma2": ({**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.05}, "what counts"),
    "Granite": ({**LLAMA_LIKE, "logits_scaling": 8.0}, "what counts"),
    "Cohere": ({**LLAMA_LIKE, "logit_scale": 0.0625}, "what counts"),
    "Phi": ({**LLAMA_LIKE, "partial_rotary_factor": 0.5}, "nothing"),  # its head has a bias
    "GPTNeoX": ({**SIZES, "vocab_size": 97}, "nothing"),
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}, "nothing"),
}


def _model(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**KINDS[kind][0]), attn_implementation="eager"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _batch(rows=3, tokens=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :5] = -100
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _perturb(model):
    adapters = adapters_of(model)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p) * 0.1)


def _read_by_head(model, batch, **options):
    """What was said, the gradients, and for how many tokens the head was run."""
    counts = []
    head = model.get_output_embeddings()

    def note(module, _, output):
        if module is head:
            counts.append(output[..., 0].numel())

    handle = register_module_forward_hook(note)
    said = counted(model, batch, **options)
    handle.remove()
    total = said.total()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return said, total, torch.autograd.grad(total, parameters), counts[-1]


def _whole(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_models_own(kind):
    model, batch = _model(kind), _batch()
    adapt(model, LoRA(r=4, lora_alpha=8))
    _perturb(model)
    said, total, gradients, tokens = _read_by_head(model, batch)
    expected = _whole(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, parameters)
    # the adapter's own dtype is float32
    for found, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(said.losses().sum(), total, rtol=1e-12, atol=0)
    assert tokens == {"nothing": 0, "what counts": 10}[KINDS[kind][1]]
    assert said.logits.shape == (10, 97)


def test_a_batch_that_begins_with_padding_does_not_hide_what_lies_behind_the_head():
    model, batch = _model("Gemma2"), _batch()
    adapt(model, LoRA(r=4))
    _perturb(model)
    batch["input_ids"][:, :8] = 0  # the embedding of padding is zero
    batch["labels"][:, :8] = -100
    total = counted(model, batch).total()
    torch.testing.assert_close(total, _whole(model, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "tied", "tokens"),
    [
        (LoRA(r=4, target_modules=["q_proj", "lm_head"]), False, 10),
        (LoRA(r=4, modules_to_save=["lm_head"]), False, 10),
        (TrainableTokens(token_indices=[5, 6]), True, 10),
        (TrainableTokens(token_indices=[5, 6]), False, 0),
        (Selective(target_modules=["lm_head"]), False, 10),
        (PromptTuning(num_virtual_tokens=3), True, 0),
    ],
    ids=["adapted", "copied", "tied to trained tokens", "not tied", "trained in place", "after virtual tokens"],
)
def test_a_head_that_is_more_than_a_frozen_linear_is_called(method, tied, tokens):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=tied)
    model, batch = transformers.LlamaForCausalLM(config), _batch()
    adapt(model, method)
    _perturb(model)
    _, total, gradients, read = _read_by_head(model, batch)
    expected = _whole(model, batch)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for found, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    assert read == tokens


def test_what_changes_logits_by_their_place_takes_them_all(build):
    class Fading(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * torch.linspace(1, 2, outputs.logits.shape[1])[:, None]
            return outputs

    torch.manual_seed(0)
    model, batch = Fading(transformers.LlamaConfig(**LLAMA_LIKE)), _batch()
    adapt(model, LoRA(r=4))
    _perturb(model)
    _, total, _, read = _read_by_head(model, batch)
    torch.testing.assert_close(total, _whole(model, batch), rtol=1e-6, atol=0)
    assert read == 36


def test_all_logits_are_computed_on_demand(build):
    model, batch = build("llama"), _batch()
    adapt(model, LoRA(r=4))
    _, total, _, read = _read_by_head(model, batch, all_logits=True)
    torch.testing.assert_close(total, counted(model, batch).total(), rtol=1e-6, atol=0)
    assert read == int(batch["attention_mask"].sum())


def test_the_comparison_leaves_adapter_and_random_numbers_as_they_were(build):
    model, batch = build("llama").train(), _batch()
    adapt(model, LoRA(r=4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    counted(model, batch)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_a_batch_without_a_token_that_counts_has_no_loss_and_no_gradient(build):
    model, batch = build("llama"), _batch()
    adapt(model, LoRA(r=4))
    batch["labels"][:] = -100
    total = counted(model, batch).total()
    total.backward()
    assert total == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_no_logits_are_kept_for_the_backward_pass(build):
    model, batch = build("llama"), _batch(rows=4, tokens=40)
    adapt(model, LoRA(r=4))
    batch["labels"] = batch["input_ids"]
    counted(model, batch)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        counted(model, batch).total()
    weight = model.get_output_embeddings().weight.shape
    assert kept
    assert not [s for s in kept if 97 in s and s not in (weight, weight[::-1])]


def test_another_thread_gets_all_logits_meanwhile(build):
    model, batch = build("llama"), _batch()
    adapt(model, LoRA(r=4))
    counted(model, batch)
    shapes = []

    def serve():
        with torch.no_grad():
            shapes.append(model(input_ids=batch["input_ids"]).logits.shape)

    norm = model.model.norm
    serving = threading.Thread(target=serve)

    def within(*_):
        if not shapes and threading.current_thread() is threading.main_thread():
            serving.start()
            serving.join()

    handle = norm.register_forward_hook(within)
    said = counted(model, batch)
    handle.remove()
    assert shapes == [(3, 12, 97)]
    assert len(said.labels) == 10


def test_what_comes_behind_the_head_is_seen_in_sixteen_bits_too():
    model, batch = _model("Gemma2").float(), _batch()
    adapt(model, LoRA(r=4))
    with torch.autocast("cpu", torch.bfloat16):
        _, total, _, read = _read_by_head(model, batch)
        own = counted(model, batch, all_logits=True).total()
    assert read == 10
    torch.testing.assert_close(total, own, rtol=1e-6, atol=0)


def test_sixteen_bits_lose_no_more_digits_than_the_models_own_loss(build):
    model, batch = build("llama"), _batch(rows=8, tokens=60)
    adapt(model, LoRA(r=4))
    _perturb(model)
    batch["labels"] = batch["input_ids"]
    exact = counted(model, batch).total().item()
    with torch.autocast("cpu", torch.bfloat16):
        said = counted(model, batch)
        total = said.total()
        own = counted(model, batch, all_logits=True).total()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, own, rtol=1e-6, atol=0)
    assert abs(own.item() - exact) < 2e-3 * exact  # logits of 8 bits: their rounding averages out over 470 tokens
