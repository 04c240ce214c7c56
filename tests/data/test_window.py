"""Texts that are longer than a model's window."""

from __future__ import annotations

import json

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.tasks.base_model import BaseModel

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "bert": lambda n: BertForSequenceClassification(BertConfig(**SIZES, vocab_size=n, max_position_embeddings=8)),
    "roberta": lambda n: RobertaForSequenceClassification(
        RobertaConfig(**SIZES, vocab_size=n, max_position_embeddings=10, pad_token_id=1)
    ),
    "gpt2": lambda n: GPT2ForSequenceClassification(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=n, n_positions=8, pad_token_id=0)
    ),
    "opt": lambda n: OPTForSequenceClassification(
        OPTConfig(**OPT, vocab_size=n, max_position_embeddings=8, pad_token_id=0)
    ),
}
ROTARY = {**SIZES, "max_position_embeddings": 8, "pad_token_id": 0}


@pytest.fixture
def fit(tmp_path, tokenizer_folder, trainer):
    """Trains one step on texts of so many tokens."""

    def run(make, tokens, max_length=32):
        rows = [{"text": " ".join(["red"] * (tokens - 2)), "label": "ab"[i % 2]} for i in range(4)]
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        tokenizer = BaseModel(str(tokenizer_folder)).load_tokenizer()
        module = PeftModule(make(len(tokenizer)), LoRA(r=2), "text_classification")
        module.tokenizer = tokenizer
        data = TextDataModule(train_files=path, validation_files=path, batch_size=4, max_length=max_length)
        trainer(max_epochs=1).fit(module, data)
        return module.trainer.global_step

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_text_beyond_the_learnt_positions_is_refused_with_the_length_that_fits(fit, name):
    with pytest.raises(ValueError, match=r"has 9 tokens, but the model has 8 positions; set data.max_length=8 or less"):
        fit(MODELS[name], 9)
    assert fit(MODELS[name], 8) == 1  # all of them can be used
    assert fit(MODELS[name], 20, max_length=8) == 1


def test_of_computed_positions_it_is_said_unless_the_model_stretches_them(fit):
    with pytest.warns(UserWarning, match=r"9 tokens, but the model was made for 8 \(max_position_embeddings\)"):
        fit(lambda n: LlamaForSequenceClassification(LlamaConfig(**ROTARY, vocab_size=n)), 9)
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = {**ROTARY, "rope_parameters": stretched}
    assert fit(lambda n: LlamaForSequenceClassification(LlamaConfig(**config, vocab_size=n)), 9) == 1


def test_relative_positions_have_no_end(fit):
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    assert fit(lambda n: BloomForSequenceClassification(BloomConfig(**sizes, vocab_size=n)), 20) == 1
