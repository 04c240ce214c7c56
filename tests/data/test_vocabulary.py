"""Tokenizers that do not quite fit their model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.data.summary import summarise

WORDS = ("red", "green", "blue", "small", "large")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join([WORDS[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    """A tiny Llama whose tokenizer has an end of text, but nothing to pad with."""

    def make(rows=None):
        known = AutoTokenizer.from_pretrained(tokenizer_folder)
        known.backend_tokenizer.no_padding()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=known.backend_tokenizer, eos_token="[SEP]", unk_token="[UNK]"
        )
        tokenizer.save_pretrained(tmp_path / "model")
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=rows or len(known), pad_token_id=0)).save_pretrained(
            tmp_path / "model"
        )
        return str(tmp_path / "model")

    return make


def test_without_a_padding_token_a_text_is_judged_as_it_is_alone(folder, texts, trainer):
    module = PeftModule(folder(), LoRA(r=2), "text_classification")
    trainer(max_epochs=1).fit(module, TextDataModule(train_files=texts, batch_size=4))

    def scores(size):
        data = TextDataModule(train_files=texts, batch_size=size)
        return [r["score"] for batch in trainer().predict(module, data) for r in batch]

    assert module.tokenizer.pad_token is None
    assert scores(8) == pytest.approx(scores(1), abs=1e-6)


def test_what_stands_for_the_missing_padding_token_is_said(folder, texts):
    module, data = PeftModule(folder(), LoRA(r=2)), TextDataModule(train_files=texts)
    data.connect(module.task, module.tokenizer)
    data.setup("fit")
    assert (
        "The tokenizer has no padding token: batches are padded with '[SEP]', which is masked." in summarise(data).notes
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_id_beyond_the_embedding_is_refused_before_training(folder, texts, trainer, streaming):
    module = PeftModule(folder(rows=2_000), LoRA(r=2))
    data = TextDataModule(train_files=texts, validation_files=texts, streaming=streaming)
    with pytest.raises(ValueError, match=r"token id 2665 \('green'\), but the model's embedding has 2000 rows"):
        trainer().fit(module, data)


def test_a_tokenizer_that_knows_more_than_the_model_is_fine_where_the_data_does_not_need_it(folder, texts, trainer):
    module = PeftModule(folder(rows=10_000), LoRA(r=2))
    trainer(max_epochs=1).fit(module, TextDataModule(train_files=texts))
    assert module.trainer.global_step > 0
