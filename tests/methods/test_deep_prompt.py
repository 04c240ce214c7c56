"""Deep prompts against a plain loop over the layers, and in training, evaluation and generation."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_peft import DeepPrompt, PromptTuning, adapt

N = 4
MODELS = ("bert", "roberta", "gpt2", "llama", "llama_classifier", "mistral", "qwen3", "t5")
ROW = torch.tensor([[5, 6, 7, 8]])


def _prompts(adapter):
    """Each layer's vectors, the first layer's first."""
    by_module = adapter.tree.layers_by_module
    with_prompt = [n for n, m in by_module.items() if hasattr(m, "prompt")]
    return [by_module[n].prompt for n in sorted(with_prompt, key=lambda n: any(c.isdigit() for c in n))]


def _through(h, prompts, layers):
    """The loop: what a layer gets has its own vectors at the first ``N`` positions."""
    for prompt, layer in zip(prompts, layers, strict=True):
        h = torch.cat([prompt.unsqueeze(0), h[:, N:]], 1) if prompt is not prompts[0] else h
        h = layer(h)
        h = h[0] if isinstance(h, tuple) else h
    return h


def _plain(name, model, prompts):
    words = torch.cat([prompts[0].unsqueeze(0), model.get_input_embeddings()(ROW)], 1)
    total = words.shape[1]
    place = torch.arange(total).unsqueeze(0)
    causal = torch.full((total, total), -1e30, dtype=torch.float64).triu(1)[None, None]
    if name == "llama":
        turned = model.model.rotary_emb(words, place)
        run = [lambda h, m=m: m(h, attention_mask=causal, position_embeddings=turned) for m in model.model.layers]
        return model.lm_head(model.model.norm(_through(words, prompts, run)))[:, N:]
    if name == "gpt2":
        run = [lambda h, m=m: m(h, attention_mask=causal) for m in model.transformer.h]
        h = _through(words + model.transformer.wpe(place), prompts, run)
        return model.lm_head(model.transformer.ln_f(h))[:, N:]
    if name == "bert":
        h = model.bert.embeddings(inputs_embeds=words, position_ids=place)
        return model.classifier(model.bert.pooler(_through(h, prompts, model.bert.encoder.layer)))
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(total, total)
    run = [lambda h, m=m: m(h, position_bias=bias) for m in model.encoder.block]
    read = model.encoder.final_layer_norm(_through(words, prompts, run))
    return model(encoder_outputs=(read,), decoder_input_ids=ROW).logits


def _padded(side, pad):
    zeros = torch.full((1, 3), pad)
    ids = torch.cat([zeros, ROW] if side == "left" else [ROW, zeros], 1)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def _more(name):
    return {"decoder_input_ids": ROW} if name == "t5" else {}


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_output_is_that_of_a_loop_which_replaces_the_prompt_before_each_layer(build, perturb, name):
    model, plain = build(name).double(), build(name).double()
    adapter = adapt(model, DeepPrompt(num_virtual_tokens=N))
    perturb(adapter, 0.5)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()
    prompts = _prompts(adapter)
    assert [tuple(p.shape) for p in prompts] == [(N, 32)] * 2
    out = model(input_ids=ROW, **_more(name)).logits
    torch.testing.assert_close(out, _plain(name, plain, prompts), rtol=1e-10, atol=1e-10)
    shallow = adapt(build(name).double(), PromptTuning(N))
    next(iter(shallow.parameters())).copy_(prompts[0])
    assert not torch.allclose(out, shallow.model(input_ids=ROW, **_more(name)).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_gives_what_the_row_alone_gives(build, perturb, name, side):
    model = build(name)
    perturb(adapt(model, DeepPrompt(num_virtual_tokens=N)), 0.5)
    alone = model(input_ids=ROW, attention_mask=torch.ones_like(ROW), **_more(name)).logits
    padded = model(**_padded(side, model.config.pad_token_id), **_more(name)).logits
    if padded.shape != alone.shape:
        padded = padded[:, 3:] if side == "left" else padded[:, :4]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5"])
def test_generation_with_a_cache_writes_what_it_writes_without(build, perturb, name, options):
    model = build(name)
    perturb(adapt(model, DeepPrompt(num_virtual_tokens=N)), 0.5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    given = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW)}
    written = model.generate(**given, **settings)
    assert torch.equal(model.generate(**given, **settings, use_cache=False), written)
    left = model.generate(**_padded("left", model.config.pad_token_id), **settings)
    assert torch.equal(left[:, -8:], written[:, -8:])


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_activation_checkpointing_changes_no_gradient(build, perturb, name, elsewhere):
    found = []
    for checkpointed in (False, True):
        model = build(name)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        adapter = adapt(model, DeepPrompt(num_virtual_tokens=N))
        perturb(adapter, 0.5)
        if checkpointed:
            model.activation_checkpointing_enable()
        loss = model.train()(**_padded("left", model.config.pad_token_id), **_more(name)).logits.pow(2).mean()
        if elsewhere:  # as on a GPU, where the backward pass has a thread of its own
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        found.append([p.grad for p in adapter.parameters()])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_a_later_layer_starts_as_wide_as_the_embeddings_and_a_first_one_at_tokens(build):
    model = build("llama")
    first, later = (p.detach() for p in _prompts(adapt(model, DeepPrompt(num_virtual_tokens=200))))
    table = model.get_input_embeddings().weight
    assert (first.unsqueeze(1) == table).all(-1).any(1).all()
    assert 0.9 < float(later.std() / first.std()) < 1.1


def test_what_does_not_fit_is_refused(build):
    with pytest.raises(ValueError, match="num_virtual_tokens must be 1 to 1000, but got 0"):
        DeepPrompt(num_virtual_tokens=0)
    with pytest.raises(ValueError, match="learning_rate must be above 0, but got -1"):
        DeepPrompt(learning_rate=-1)
    with pytest.raises(ValueError, match="found none in ConvNet; choose another method"):
        adapt(build("convnet"), DeepPrompt())
    with pytest.raises(ValueError, match="layer_modules: 'layr' matches no module; did you mean 'layer'"):
        adapt(build("bert"), DeepPrompt(layer_modules=["layr"]))
    model = build("bert")
    adapt(model, DeepPrompt())
    with pytest.raises(RuntimeError, match="a layer ran without the model's forward around it"):
        model.bert.encoder.layer[1](torch.randn(1, 5, 32))


@torch.no_grad()
def test_layers_named_by_hand_are_those_that_are_found(build, call):
    found, named = build("bert"), build("bert")
    for model, layers in ((found, None), (named, r".*encoder\.layer\.\d")):
        torch.manual_seed(3)
        adapt(model, DeepPrompt(num_virtual_tokens=N, layer_modules=layers))
    assert torch.equal(call(found, "bert"), call(named, "bert"))
