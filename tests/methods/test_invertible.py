"""MAD-X's invertible adapters: the coupling block, its inverse, and both at the ends of language models."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from lightning_peft import BottleneckAdapter, activate, adapt, load_adapter
from lightning_peft.methods.invertible import couple, uncouple

ENDS = {
    "masked": (["bert.embeddings.word_embeddings"], "cls.predictions.decoder"),
    "gpt2": (["transformer.wte"], "lm_head"),
    "llama": (["model.embed_tokens"], "lm_head"),
    "t5": (["encoder.embed_tokens", "decoder.embed_tokens"], "lm_head"),
}
MADX = {"mh_adapter": False, "reduction_factor": 4, "original_ln_before": True, "inv_adapter": "nice"}
ROW = torch.tensor([[5, 6, 7]])


def _masked():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=97, max_position_embeddings=64)).eval()


@pytest.fixture
def build(build):
    return lambda name: _masked() if name == "masked" else build(name)


class Mirror(nn.Module):
    """A language model whose head reads what it has embedded: with an inverse before the head it is the base."""

    def __init__(self, width=8, read=8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace()
        self.embed, self.mlp, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(read, 11)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        x = self.embed(input_ids)
        self.mlp(x)
        return self.head(x)


MIRROR = BottleneckAdapter(mh_adapter=False, feed_forward_modules=["mlp"], inv_adapter="nice")


def _double(adapter):
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()


def _blocks_parameters(adapter):
    return {n: p for n, p in adapter.tree.named_parameters() if n.rpartition(".")[2][:2] in ("f_", "g_")}


@pytest.mark.parametrize("width", [12, 7, 1])
def test_the_inverse_undoes_the_block(width):
    torch.manual_seed(0)
    a, b = width // 2, width - width // 2
    to_first, to_second = (torch.randn(n, m, dtype=torch.float64) * 3 for n, m in ((b, a), (a, b)))
    functions = (lambda x: torch.tanh(x @ to_first), lambda x: torch.sin(x @ to_second))
    x = torch.randn(2, 5, width, dtype=torch.float64)
    y = couple(x, *functions)
    assert not torch.allclose(y, x) or width == 1
    torch.testing.assert_close(uncouple(y, *functions), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(couple(uncouple(x, *functions), *functions), x, rtol=0, atol=1e-12)


def _nice(x, p, act, *, back):
    """The paper's block, written plainly."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]

    def f(e):
        return act(e @ p["f_down_weight"].T + p["f_down_bias"]) @ p["f_up_weight"].T + p["f_up_bias"]

    def g(e):
        return act(e @ p["g_down_weight"].T + p["g_down_bias"]) @ p["g_up_weight"].T + p["g_up_bias"]

    if back:
        second = second - g(first)
        first = first - f(second)
    else:
        first = first + f(second)
        second = second + g(first)
    return torch.cat([first, second], -1)


@pytest.mark.parametrize(("kind", "act"), [("relu", torch.relu), ("tanh", torch.tanh)])
@pytest.mark.parametrize("name", ENDS)
def test_logits_and_gradients_are_those_of_the_papers_formula(build, call, perturb, name, kind, act):
    embeddings, head = ENDS[name]
    model = build(name).double()
    adapter = adapt(model, BottleneckAdapter(**MADX, inv_adapter_reduction_factor=4, non_linearity=kind))
    perturb(adapter, 0.3)
    _double(adapter)
    block = _blocks_parameters(adapter)
    shapes = {n.rpartition(".")[2]: tuple(p.shape) for n, p in block.items()}
    assert shapes == {
        **{f"{n}_down_weight": (4, 16) for n in "fg"},
        **{f"{n}_down_bias": (4,) for n in "fg"},
        **{f"{n}_up_weight": (16, 4) for n in "fg"},
        **{f"{n}_up_bias": (16,) for n in "fg"},
    }
    p = {n.rpartition(".")[2]: t.detach().clone().requires_grad_() for n, t in block.items()}
    plain = build(name).double().requires_grad_(False)
    # the bottlenecks are the same in both, so the block is all that is compared
    bottlenecks = adapt(plain, BottleneckAdapter(**MADX | {"inv_adapter": None}, non_linearity=kind))
    _double(bottlenecks)
    bottlenecks.tree.load_state_dict({n: t for n, t in adapter.state_dict().items() if n not in block})
    for place in embeddings:
        plain.get_submodule(place).register_forward_hook(lambda m, args, x: _nice(x, p, act, back=False))
    plain.get_submodule(head).register_forward_pre_hook(lambda m, args: (_nice(args[0], p, act, back=True),))
    outputs = [call(m, name) for m in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.pow(2).mean().backward()
    for n, parameter in block.items():
        torch.testing.assert_close(parameter.grad, p[n.rpartition(".")[2]].grad, rtol=1e-9, atol=1e-13)
        assert parameter.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ENDS)
def test_a_language_model_starts_as_the_base_and_a_tied_head_stays_tied(build, call, perturb, name):
    model = build(name)
    base, tied = call(model, name), model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adapter = adapt(model, BottleneckAdapter(**MADX))
    assert torch.equal(call(model, name), base)
    perturb(adapter)
    assert not torch.equal(call(model, name), base)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert tied == (name != "llama")
    adapter.remove()
    assert torch.equal(call(model, name), base)


@torch.no_grad()
def test_the_head_reads_what_was_embedded_whatever_the_block_has_learnt(perturb):
    model = Mirror().double()
    ids = torch.arange(11).unsqueeze(0)
    base = model(ids)
    for name in ("one", "two"):
        adapter = adapt(model, MIRROR, name)
        perturb(adapter, 1.0)
        _double(adapter)
    torch.testing.assert_close(model(ids), base, rtol=0, atol=1e-12)
    # with both active the second block comes after the first, so its inverse comes before the first's
    activate(model, "one", "two")
    torch.testing.assert_close(model(ids), base, rtol=0, atol=1e-12)
    read = []
    model.mlp.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    model(ids)
    assert not torch.allclose(read[0], model.embed.weight[ids], atol=0.1)


def test_a_classifier_has_the_first_direction_alone(build):
    places = list(adapt(build("bert"), BottleneckAdapter(**MADX)).tree.layers_by_module)
    blocks = [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    assert sorted(places) == sorted([*blocks, "bert.embeddings.word_embeddings"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_with_a_cache_writes_what_it_writes_without(build, perturb, name):
    model = build(name)
    perturb(adapt(model, BottleneckAdapter(**MADX)), 0.3)
    settings = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**settings), model.generate(**settings, use_cache=False))
    if name == "t5":
        return
    whole = model(input_ids=ROW).logits
    torch.testing.assert_close(model(input_ids=ROW, logits_to_keep=1).logits, whole[:, -1:])


def test_a_head_that_the_checkpoint_lacked_trains_behind_the_inverse(build, call, tmp_path):
    from transformers import LlamaForCausalLM

    build("llama").model.save_pretrained(tmp_path / "trunk")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "trunk")
    adapter = adapt(model, BottleneckAdapter(**MADX))
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):  # `up` is zero in the first step
        call(model, "llama").pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)
    assert _blocks_parameters(adapter)["model.embed_tokens.f_down_weight"].grad.any()
    adapter.save(tmp_path / "adapter")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "trunk")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(call(fresh, "llama"), call(model, "llama"))


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        ({}, "convnet", "needs exactly one module with get_input_embeddings.* found none in ConvNet"),
        ({"modules_to_save": ["lm_head"]}, "llama", "modules_to_save names 'lm_head', where the invertible adapter"),
        ({"modules_to_save": ["wte"]}, "gpt2", "modules_to_save names 'transformer.wte', where the invertible"),
    ],
)
def test_a_model_without_a_place_for_it_is_refused(build, options, make, message):
    blocks = {"feed_forward_modules": ["conv1"]} if make == "convnet" else {}
    with pytest.raises(ValueError, match=message):
        adapt(build(make), BottleneckAdapter(**MADX, **blocks, **options))


def test_output_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"8-wide input embeddings does not fit 'head', a Linear of width 6"):
        adapt(Mirror(8, 6), MIRROR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inv_adapter": "nise"}, "inv_adapter 'nise' is unknown; did you mean 'nice'"),
        ({"inv_adapter": "glow"}, "inv_adapter 'glow' is unknown; known: nice"),
        ({"inv_adapter_reduction_factor": 0}, "inv_adapter_reduction_factor must be above 0, but got 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**options)
