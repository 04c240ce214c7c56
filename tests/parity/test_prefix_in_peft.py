"""Prefix tuning, and prompts, beside Hugging Face PEFT's, where one test for all methods cannot say it."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lightning_peft import PrefixTuning, PromptTuning, PTuning, adapt, load_adapter

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def build(build):
    """The usual models, T5 with more layers, and a BART whose two halves have heads of their own."""

    def make(name):
        torch.manual_seed(0)
        if name.startswith("t5-"):
            sizes = {"d_model": 32, "d_ff": 64, "num_layers": int(name[3:]), "num_heads": 4, "d_kv": 8}
            config = T5Config(**sizes, vocab_size=97, pad_token_id=0, decoder_start_token_id=0)
            return T5ForConditionalGeneration(config).eval()
        if name == "bart":
            sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
            sizes |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 32, "d_model": 32, "vocab_size": 97}
            special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            return BartForConditionalGeneration(BartConfig(**sizes, **special)).eval()
        return build(name)

    return make


@pytest.fixture
def call(call):
    """Runs an encoder-decoder by its kind."""
    return lambda model, name: call(model, "t5" if name.startswith(("t5", "bart")) else name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5-3", "t5-4", "bart", "qwen3"])
def test_peft_gives_the_output_of_our_file(build, call, name, tmp_path):
    ours = build(name)
    adapt(ours, PrefixTuning(5)).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").double().eval()
    ours.double()
    torch.testing.assert_close(call(ours, name), call(theirs, name), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_classifier_and_its_head_are_those_of_peft(build, call, tmp_path):
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5, modules_to_save=["classifier"])
    torch.manual_seed(3)
    theirs = peft.get_peft_model(build("bert"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build("bert")
    load_adapter(ours, tmp_path / "theirs").save(tmp_path / "ours")
    expected = call(theirs, "bert")
    torch.testing.assert_close(call(ours, "bert"), expected, rtol=1e-5, atol=1e-5)
    again = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "ours").eval()
    torch.testing.assert_close(call(again, "bert"), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_peft_reads_what_the_network_gives(build, call, name, tmp_path):
    ours = build(name)
    adapt(ours, PrefixTuning(5, prefix_projection=True, encoder_hidden_size=6)).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").eval()
    torch.testing.assert_close(call(ours, name), call(theirs, name), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_peft_writes_the_same_text(build, name, tmp_path):
    ours = build(name)
    adapt(ours, PrefixTuning(5)).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(input_ids=ids, **settings), theirs.generate(input_ids=ids, **settings))


@torch.no_grad()
@pytest.mark.parametrize("method", [PrefixTuning, PromptTuning, PTuning])
def test_peft_puts_the_prompt_before_the_text_of_a_model_without_a_head(build, method, tmp_path):
    ids = torch.arange(12).view(2, 6) + 3
    ours = build("bert").bert
    adapt(ours, method(num_virtual_tokens=5)).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build("bert").bert, tmp_path / "a").eval()
    expected = ours(input_ids=ids).last_hidden_state
    actual = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -6:]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
