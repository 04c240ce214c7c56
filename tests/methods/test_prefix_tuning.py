"""A prefix in training, evaluation and generation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from lightning_peft import PrefixTuning, adapt

MODELS = ("bert", "roberta", "gpt2", "llama", "llama_classifier", "mistral", "qwen3", "t5")
DECODERS = ("gpt2", "llama", "mistral", "qwen3", "t5", "bart", "neox")
ROW = torch.tensor([[5, 6, 7]])


@pytest.fixture
def build(build):
    """The usual models, and two whose caches or positions go by other names."""

    def make(name):
        torch.manual_seed(0)
        if name == "bart":
            sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
            sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32, "max_position_embeddings": 64}
            special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            config = BartConfig(vocab_size=97, **sizes, **special, forced_eos_token_id=None)
            return BartForConditionalGeneration(config).eval()
        if name == "neox":
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, pad_token_id=0, **sizes)).eval()
        return build(name)

    return make


def _padded(side, pad):
    zeros = torch.full((1, 3), pad)
    ids = torch.cat([zeros, ROW] if side == "left" else [ROW, zeros], 1)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*MODELS, "neox"])
def test_a_padded_row_gives_what_the_row_alone_gives(build, name, side):
    model = build(name)
    adapt(model, PrefixTuning(4))
    more = {"decoder_input_ids": ROW} if name == "t5" else {}
    alone = model(input_ids=ROW, attention_mask=torch.ones_like(ROW), output_hidden_states=True, **more)
    padded = model(**_padded(side, model.config.pad_token_id), output_hidden_states=True, **more)
    if name in ("bert", "roberta"):  # whose classifiers read the first column, padding or not
        alone, padded = alone.hidden_states[-1], padded.hidden_states[-1]
    else:
        alone, padded = alone.logits, padded.logits
    if padded.shape != alone.shape:
        padded = padded[:, 3:] if side == "left" else padded[:, :3]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_beams": 1}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_writes_what_it_writes_without(build, name, options):
    model = build(name)
    adapt(model, PrefixTuning(4))
    written = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 8, "do_sample": False, **options, **more}
        written.append(model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), **settings))
    assert torch.equal(*written)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    again = model.generate(**_padded("left", model.config.pad_token_id), **settings)
    new = 8 if name not in ("t5", "bart") else written[0].shape[1]
    assert torch.equal(again[:, -new:], written[0][:, -new:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_static_cache_holds_the_text_and_writes_the_same(build, name):
    model = build(name)
    adapt(model, PrefixTuning(4))
    row = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**row)
    static = model.generate(**row, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "neox"])
def test_a_cache_that_is_given_back_goes_on_with_the_text(build, name):
    model = build(name)
    adapt(model, PrefixTuning(4))
    text = torch.tensor([[5, 6, 7, 8, 9]])
    whole = model(input_ids=text).logits
    first = model(input_ids=text[:, :2], use_cache=True)
    second = model(input_ids=text[:, 2:], past_key_values=first.past_key_values, use_cache=True)
    assert second.past_key_values.get_seq_length() == 5
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prefix_of_a_real_texts_keys_and_values_is_that_text(build):
    """What GPT-2 has in its cache after some tokens, as the prefix, makes it read on as behind those tokens."""
    model = build("gpt2")
    prefix = torch.tensor([[11, 12, 13, 14]])
    expected = model(input_ids=torch.cat([prefix, ROW], 1)).logits[:, 4:]
    cache = model(input_ids=prefix, use_cache=True).past_key_values
    adapter = adapt(model, PrefixTuning(4))
    slots = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    adapter.parameters()[0].copy_(torch.cat(slots, 1))
    torch.testing.assert_close(model(input_ids=ROW).logits, expected, rtol=1e-5, atol=1e-5)
    loss = model(input_ids=ROW, labels=ROW).loss
    torch.testing.assert_close(loss, F.cross_entropy(expected[0, :-1], ROW[0, 1:]))


@torch.no_grad()
def test_tokens_beyond_a_sliding_window_still_read_the_prefix(build, perturb):
    model = build("mistral")
    adapter = adapt(model, PrefixTuning(4))
    text = torch.arange(5, 25).unsqueeze(0)
    before = model(input_ids=text).logits[:, -1]
    perturb(adapter, 1.0)
    assert (model(input_ids=text).logits[:, -1] - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "t5", "bart", "neox"])
def test_gradients_under_checkpointing_are_those_without(build, name, options, kind):
    model = build(name)
    model.set_attn_implementation(kind)
    adapter = adapt(model, PrefixTuning(4, **options))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    text = {"input_ids": torch.arange(5, 17).view(2, 6)}
    text |= {"decoder_input_ids": text["input_ids"]} if name in ("t5", "bart") else {}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**text).logits.pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    assert all(g.abs().max() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "t5", "bart", "neox"])
def test_both_kinds_of_attention_give_the_same(build, name):
    outputs = []
    for kind in ("sdpa", "eager"):
        model = build(name)
        model.set_attn_implementation(kind)
        torch.manual_seed(1)
        adapt(model, PrefixTuning(4))
        more = {"decoder_input_ids": ROW} if name in ("t5", "bart") else {}
        outputs.append(model(input_ids=ROW, **more).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_embedded_text_is_read_like_its_ids(build):
    model = build("llama")
    adapt(model, PrefixTuning(4))
    embedded = model.get_input_embeddings()(ROW)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(input_ids=ROW).logits)


@torch.no_grad()
def test_positions_that_are_given_are_moved_on(build):
    model = build("gpt2")
    adapt(model, PrefixTuning(4))
    expected = model(input_ids=ROW).logits
    torch.testing.assert_close(model(input_ids=ROW, position_ids=torch.arange(3).unsqueeze(0)).logits, expected)


def test_a_prefix_and_the_text_must_fit_the_models_positions(build):
    model = build("gpt2")
    adapt(model, PrefixTuning(60))
    with pytest.raises(ValueError, match=r"60 virtual tokens and 5 of text exceed the model's 64 positions"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="num_virtual_tokens must be 1 to 1000, but got 1001"):
        PrefixTuning(1001)
    with pytest.raises(ValueError, match="encoder_hidden_size must be 1 or more, but got 0"):
        PrefixTuning(prefix_projection=True, encoder_hidden_size=0)
    with pytest.raises(ValueError, match="only prefix_projection=True has"):
        PrefixTuning(encoder_hidden_size=8)
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        PrefixTuning(learning_rate=0)


def test_models_without_a_place_for_a_prefix_are_refused_by_name(build):
    with pytest.raises(ValueError, match="found none in ConvNet"):
        adapt(build("convnet"), PrefixTuning())
    distilbert = DistilBertModel(DistilBertConfig(vocab_size=50, dim=8, n_heads=2, n_layers=1, hidden_dim=8))
    with pytest.raises(ValueError, match=r"DistilBertModel has none; PromptTuning asks for less"):
        adapt(distilbert, PrefixTuning())
    for model in (
        BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2)),
        MptForCausalLM(MptConfig(vocab_size=50, d_model=8, n_layers=1, n_heads=2)),
    ):
        with pytest.raises(ValueError, match=r"Attention is given a bias by distance"):
            adapt(model, PrefixTuning())


def test_attention_that_makes_masks_of_its_own_is_refused(build):
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' does not take"):
        adapt(model, PrefixTuning())
    model = build("llama")
    adapt(model, PrefixTuning(4))
    with pytest.raises(ValueError, match=r"masks of \(batch, heads, tokens, keys\), but got a \(1, 3\) tensor"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 32), attention_mask=torch.ones(1, 3))


def test_keys_of_another_size_than_the_configurations_are_refused(build):
    model = build("llama")
    model.config.head_dim = 4
    adapt(model, PrefixTuning(4))
    with pytest.raises(ValueError, match="2 heads of 4 from the model's configuration, but a layer has 2 of 8"):
        model(input_ids=ROW)
