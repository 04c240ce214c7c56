"""Virtual tokens in training, evaluation and generation."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lightning_peft import DeepPrompt, PrefixTuning, PromptTuning, PTuning, adapt

MODELS = ("bert", "roberta", "gpt2", "llama", "llama_classifier", "mistral", "qwen3", "t5")
ROW = torch.tensor([[5, 6, 7]])


def _padded(side, pad):
    zeros = torch.full((1, 3), pad)
    ids = torch.cat([zeros, ROW] if side == "left" else [ROW, zeros], 1)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_gives_what_the_row_alone_gives(build, name, side):
    model = build(name)
    adapt(model, PromptTuning(4))
    more = {"decoder_input_ids": ROW} if name == "t5" else {}
    alone = model(input_ids=ROW, attention_mask=torch.ones_like(ROW), **more).logits
    padded = model(**_padded(side, model.config.pad_token_id), **more).logits
    if padded.shape != alone.shape:
        padded = padded[:, 3:] if side == "left" else padded[:, :3]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_beams": 1}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3", "t5"])
def test_generation_with_a_cache_writes_what_it_writes_without(build, name, options):
    model = build(name)
    adapt(model, PromptTuning(4))
    written = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 8, "do_sample": False, **options, **more}
        written.append(model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), **settings))
    assert torch.equal(*written)
    padded = _padded("left", model.config.pad_token_id)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    again = model.generate(**padded, **settings)
    new = 8 if name != "t5" else written[0].shape[1]
    assert torch.equal(again[:, -new:], written[0][:, -new:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_prompt_is_what_embedded_tokens_in_its_place_would_be(build, name):
    """With the embeddings of real tokens as the prompt, the model reads just those tokens."""
    model = build(name)
    prefix = torch.tensor([[11, 12, 13, 14]])
    expected = model(input_ids=torch.cat([prefix, ROW], 1)).logits[:, 4:]
    adapter = adapt(model, PromptTuning(4))
    adapter.parameters()[0].copy_(model.get_input_embeddings().weight[prefix[0]])
    out = model(input_ids=ROW, labels=ROW)
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    own = torch.nn.functional.cross_entropy(expected[0, :-1], ROW[0, 1:])
    with_prompt = model(input_ids=ROW, labels=torch.tensor([[-100, 6, 7]])).loss
    torch.testing.assert_close(with_prompt, own)


def test_virtual_tokens_and_text_must_fit_the_models_positions(build):
    model = build("gpt2")
    adapt(model, PromptTuning(60))
    with pytest.raises(
        ValueError, match=r"60 virtual tokens and 5 of text exceed the model's 64 positions; cut .* to 4"
    ):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("kind", ["RANDOM", "SAMPLE_VOCAB", "TEXT"])
def test_the_prompt_starts_as_asked(build, kind, tokenizer_folder, llama_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    text = {"prompt_tuning_init_text": "red green", "tokenizer_name_or_path": tokenizer_folder}
    adapter = adapt(model, PromptTuning(5, prompt_tuning_init=kind, **(text if kind == "TEXT" else {})))
    prompt, table = adapter.parameters()[0].detach(), model.get_input_embeddings().weight
    if kind == "TEXT":
        ids = AutoTokenizer.from_pretrained(tokenizer_folder)("red green", add_special_tokens=False)["input_ids"]
        assert torch.equal(prompt, table[(ids * 3)[:5]])
    is_a_token = (prompt.unsqueeze(1) == table).all(-1).any(1)
    assert is_a_token.all() == (kind != "RANDOM")


def test_what_has_no_tokens_is_refused(build):
    with pytest.raises(ValueError, match="found none in ConvNet; choose another method"):
        adapt(build("convnet"), PromptTuning())
    with pytest.raises(ValueError, match="num_virtual_tokens must be 1 to 1000, but got 0"):
        PromptTuning(0)
    with pytest.raises(ValueError, match="prompt_tuning_init 'RANDM' is unknown; did you mean 'RANDOM'"):
        PromptTuning(prompt_tuning_init="RANDM")
    with pytest.raises(ValueError, match="needs prompt_tuning_init_text"):
        PromptTuning(prompt_tuning_init="TEXT")


def test_an_encoder_that_reads_no_tokens_is_refused():
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"], 1)
    config = WhisperConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, **sizes)
    with pytest.raises(ValueError, match="WhisperEncoder, embeds no tokens"):
        adapt(WhisperForConditionalGeneration(config), PromptTuning(4))


@pytest.mark.parametrize("kind", [PromptTuning, PTuning, PrefixTuning, DeepPrompt])
def test_how_many_virtual_tokens_needs_no_name(kind):
    assert kind(5).num_virtual_tokens == 5
