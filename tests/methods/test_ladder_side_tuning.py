"""The side network against the paper's formula, and that the backbone keeps nothing and passes nothing back."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification

from lightning_peft import Adapter, LadderSideTuning, LoRA, activate, adapt

STACKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "llama_classifier": "model.layers",
    "mistral": "model.layers",
    "t5": "decoder.block",
    "encoder": "encoder.layers",
}
ROW = torch.tensor([[5, 6, 7]])


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _written_out(model, stack, p, temperature):
    """Makes the plain base add what the paper's side network gives at its last layer."""
    layers = list(model.get_submodule(stack))
    states = []

    def linear(place, x):
        return x @ p[f"{place}_weight"].T + p[f"{place}_bias"]

    def norm(place, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{place}_weight"] + p[f"{place}_bias"]

    def start(module, args, kwargs):
        states[:] = [linear(f"{stack}.0.first", args[0] if args else kwargs["hidden_states"])]

    def rung(number):
        def hook(module, args, output):
            h, place = _first(output), f"{stack}.{number}"
            s = states[-1]
            if f"{place}.alpha" in p:
                mu = 1 / (1 + torch.exp(-p[f"{place}.alpha"] / temperature))
                z = mu * linear(f"{place}.down", h) + (1 - mu) * s
                s = z + linear(f"{place}.outer", F.gelu(linear(f"{place}.inner", norm(f"{place}.norm", z))))
            states.append(s)
            if number == len(layers) - 1:
                h = h + linear(f"{place}.up", norm(f"{place}.final_norm", s))
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    layers[0].register_forward_pre_hook(start, with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(rung(number))
    return model


def _double(adapter):
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()


@pytest.mark.parametrize(
    "options", [{}, {"layers_to_transform": 1, "temperature": 0.5, "reduction_factor": 3}], ids=str
)
@pytest.mark.parametrize("name", STACKS)
def test_the_output_and_the_gradients_are_those_of_the_papers_formula(build, call, perturb, name, options):
    method = LadderSideTuning(**({"reduction_factor": 4} | options))
    model = build(name).double()
    adapter = adapt(model, method)
    perturb(adapter, 0.3)
    _double(adapter)
    tensors = {n: t.clone().requires_grad_() for n, t in adapter.state_dict().items()}
    plain = _written_out(build(name).double().requires_grad_(False), STACKS[name], tensors, method.temperature)
    # torch's own encoder reads past its layers unless it is in training; there is no dropout in it
    mode = name == "encoder"
    outputs = [call(m.train(mode), name) for m in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    for output in outputs:
        output.pow(2).mean().backward()
    for key, parameter in adapter.tree.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[key].grad, rtol=1e-9, atol=1e-12)


def _saved_bytes(run):
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_backbones_inner_size():
    def kept(method, inner, layers=2):
        sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": inner}
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=97))
        adapt(model, method)
        return _saved_bytes(lambda: model.train()(input_ids=torch.randint(3, 97, (4, 16))).logits.sum())

    # with a trained embedding below the layers autograd would have a reason to go through them
    for saved in (None, ["word_embeddings"]):
        ladder, lora = LadderSideTuning(modules_to_save=saved), LoRA(r=2, modules_to_save=saved)
        assert kept(ladder, 32) == kept(ladder, 1024)
        assert kept(lora, 1024) > kept(lora, 32) > 2 * kept(ladder, 32)


@pytest.mark.parametrize("name", STACKS)
def test_nothing_inside_the_backbones_layers_is_part_of_the_graph(build, call, perturb, name):
    model = build(name)
    perturb(adapt(model, LadderSideTuning()))
    layers = list(model.get_submodule(STACKS[name]))
    # what comes in requires a gradient, as it does above a trained embedding
    layers[0].register_forward_pre_hook(lambda m, args: (args[0].detach().requires_grad_(), *args[1:]))
    inside = [m for layer in layers for m in layer.modules() if m is not layer] + layers[:-1]
    seen = []
    for module in inside:
        module.register_forward_hook(lambda m, a, output: seen.append(_first(output)))
    call(model.train(), name).sum().backward()
    tensors = [t for t in seen if isinstance(t, torch.Tensor)]
    assert len(tensors) > 2 * len(layers)
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_gradients_under_checkpointing_are_those_without(build, call, perturb, name):
    gradients = []
    for checkpointed in (True, False):
        model = build(name)
        adapter = adapt(model, LadderSideTuning(reduction_factor=4, dropout=0.1))
        perturb(adapter)
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        call(model.train(), name).pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in adapter.tree.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
        assert gradient.any() or key.endswith("alpha")


# left padding of BERT and RoBERTa is not here: they are read at the left edge
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "side"),
    [(n, s) for n in ("gpt2", "llama", "llama_classifier", "mistral", "t5") for s in ("left", "right")]
    + [("bert", "right"), ("roberta", "right")],
)
def test_a_padded_row_gives_what_the_row_alone_gives(build, perturb, name, side):
    model = build(name)
    perturb(adapt(model, LadderSideTuning(reduction_factor=4)), 0.3)
    pad = model.config.pad_token_id
    zeros = torch.full((1, 3), pad)
    ids = torch.cat([ROW, zeros] if side == "right" else [zeros, ROW], 1)
    mask = (ids != pad).long()
    more = {"decoder_input_ids": ROW} if name == "t5" else {}
    alone = model(input_ids=ROW, attention_mask=torch.ones_like(ROW), **more).logits
    if name in ("gpt2", "llama", "mistral"):
        more = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    padded = model(input_ids=ids, attention_mask=mask, **more).logits
    if padded.shape != alone.shape:
        padded = padded[mask.bool()].view_as(alone)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


DYNAMIC = [(name, options) for name in ("gpt2", "llama", "mistral", "t5") for options in ({}, {"num_beams": 3})]
STATIC = [(name, {"cache_implementation": "static", "disable_compile": True}) for name in ("gpt2", "llama")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), DYNAMIC + STATIC, ids=str)
def test_generation_with_a_cache_writes_what_it_writes_without(build, perturb, name, options):
    model = build(name)
    perturb(adapt(model, LadderSideTuning(reduction_factor=4)), 0.3)
    settings = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW), "max_new_tokens": 8, "do_sample": False}
    beams = {"num_beams": options.get("num_beams", 1)}
    without = model.generate(**settings, **beams, use_cache=False)
    assert torch.equal(model.generate(**settings, **options), without)


def test_two_ladders_run_together_and_both_train(build, call, perturb):
    model = build("gpt2")
    one, two = (adapt(model, LadderSideTuning(reduction_factor=f), n) for f, n in ((4, "one"), (8, "two")))
    perturb(one)
    one.activate()
    alone = call(model, "gpt2")
    activate(model, "one", "two")
    assert torch.equal(call(model, "gpt2"), alone)  # the second starts at nothing
    perturb(two)
    together = call(model, "gpt2")
    assert not torch.equal(together, alone)
    together.pow(2).mean().backward()
    for adapter in (one, two):
        assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@torch.no_grad()
def test_a_ladder_stands_on_what_other_adapters_make_of_the_backbone(build, call, perturb):
    model = build("llama")
    lora = adapt(model, LoRA(r=2), "lora")
    perturb(lora)
    with_lora = call(model, "llama")
    adapt(model, LadderSideTuning(), "ladder")
    assert not torch.equal(call(model, "llama"), with_lora)
    activate(model, "lora", "ladder")
    assert torch.equal(call(model, "llama"), with_lora)


def test_forwards_in_several_threads_keep_their_states_apart(build, perturb):
    model = build("gpt2")
    perturb(adapt(model, LadderSideTuning(reduction_factor=4)), 0.3)
    rows = [torch.tensor([[3 + i, 4 + i, 5 + i]]) for i in range(4)]
    expected = [model(input_ids=r).logits.detach() for r in rows]
    barrier, layer = threading.Barrier(4, timeout=30), model.transformer.h[0]

    def wait(*_):  # all are between the first layer and the second
        barrier.wait()

    layer.register_forward_hook(wait)
    got: list[torch.Tensor | None] = [None] * 4

    def serve(i):
        got[i] = model(input_ids=rows[i]).logits.detach()

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for mine, alone in zip(got, expected, strict=True):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize("backward", [True, False])
def test_hidden_states_are_freed_with_the_output(build, call, perturb, backward):
    model = build("bert")
    perturb(adapt(model, LadderSideTuning()))
    states = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, a, output: states.append(weakref.ref(_first(output))))
    logits = call(model, "bert")
    assert len(states) == 2
    if backward:
        logits.sum().backward()
    del logits
    gc.collect()
    assert not any(s() is not None for s in states)


def test_the_embedding_and_the_head_train_with_the_side_network(build, call):
    model = build("bert")
    adapter = adapt(model, LadderSideTuning(modules_to_save=["word_embeddings", "classifier"]))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    start = {n: t.clone() for n, t in adapter.state_dict().items()}
    for _ in range(2):  # `up` is zero in the first step, so what is below it moves in the second
        call(model.train(), "bert").pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(t, start[n]) for n, t in adapter.state_dict().items())


class Blocks(nn.Module):
    """Layers under a name that is not known."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12)) for _ in range(3))
        self.skip = skip

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * 1 if self.skip else block(x)
        return x


def test_the_layers_of_an_unknown_model_can_be_named(perturb):
    model = Blocks()
    x = torch.randn(2, 12)
    base = model(x)
    adapter = adapt(model, LadderSideTuning(layer_modules=r"blocks\.\d+", reduction_factor=3))
    assert torch.equal(model(x), base)
    perturb(adapter)
    model(x).sum().backward()
    assert not torch.equal(model(x), base)
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_stack_is_found_by_what_the_model_says_of_itself_under_any_name():
    adapter = adapt(Blocks(), LadderSideTuning())
    assert list(adapter.tree.layers_by_module) == ["blocks.0", "blocks.1", "blocks.2"]
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16}
    bart = BartForConditionalGeneration(BartConfig(encoder_layers=1, decoder_layers=3, **sizes))
    adapter = adapt(bart, LadderSideTuning())
    assert list(adapter.tree.layers_by_module) == [f"model.decoder.layers.{i}" for i in range(3)]


def test_a_hidden_state_that_was_replaced_on_the_way_is_an_error():
    model = Blocks(skip=True)
    adapt(model, LadderSideTuning(layer_modules=r"blocks\.\d+"))
    with pytest.raises(
        RuntimeError, match=r"got another tensor than the layer before it gave, .* the side state is lost"
    ):
        model(torch.randn(2, 12))


def test_layers_of_unequal_width_are_refused_by_name():
    said = r"needs layers of one width, but got \{'0': \(8, 12\), '1': 12\}; name such in layer_modules"
    with pytest.raises(ValueError, match=said):
        adapt(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12)), LadderSideTuning(layer_modules=["0", "1"]))
    # what is inside a layer need not tell how wide it is
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, w)) for w in (8, 6)))
    adapt(model, LadderSideTuning(layer_modules=r"\d"))
    with pytest.raises(RuntimeError, match=r"'1' takes 8 and gives 6, where the ladder is for 8; name layers of one"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "convnet", "finds no stack of layers in ConvNet; name the layers in layer_modules, for instance"),
        ({"layers_to_transform": [7]}, "bert", r"no module in layer \[7\]; the matched modules lie in layers 0 to 1"),
        ({"layer_modules": ["blok"]}, "bert", "layer_modules: 'blok' matches no module"),
        (
            {"layer_modules": r".*block\.\d"},
            "t5",
            r"one stack of layers, but \S+ has \['decoder.block', 'encoder.block'\]",
        ),
        ({"layer_modules": ["conv1", "head"]}, "convnet", "needs layers of one width, but got .*'head': .*4"),
        ({"modules_to_save": ["LayerNorm"]}, "bert", "names .*layer.0.attention.output.LayerNorm', but .* run without"),
        ({"modules_to_save": ["transformer"]}, "gpt2", "names 'transformer', but the backbone's layers"),
    ],
)
def test_what_does_not_fit_is_refused(build, options, name, message):
    with pytest.raises(ValueError, match=message):
        adapt(build(name), LadderSideTuning(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be above 0, but got 0"),
        ({"temperature": -1, "dropout": 1}, "temperature must be above 0, but got -1; dropout must be at least 0 and"),
        ({"learning_rate": 0}, "learning_rate must be above 0, but got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LadderSideTuning(**options)


def test_a_recomputation_with_another_ladder_raises(build, call, perturb):
    model = build("gpt2")
    for name in ("a", "b"):
        perturb(adapt(model, LadderSideTuning(), name), 0.1)
    model.activation_checkpointing_enable()
    loss = call(model.train(), "gpt2").sum()
    Adapter(model, "a").activate()
    with pytest.raises(RuntimeError, match="recomputed with other adapters active than in its forward"):
        loss.backward()


@pytest.mark.slow
def test_a_ladder_compiles_as_one_graph_with_its_backward(build, call, perturb):
    model = build("llama")
    adapter = adapt(model, LadderSideTuning(reduction_factor=4))
    perturb(adapter)
    gradients = []
    for runs in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        call(runs, "llama").pow(2).mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients)
