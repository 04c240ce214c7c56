"""Prompt and completion as tokens, and the loss on the completion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_peft import SupervisedFineTuning


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def _encode(tokenizer, prompt, completion, max_length):
    return SupervisedFineTuning().encode(
        [{"prompt": prompt, "completion": completion}], tokenizer, max_length, training=True
    )[0]


def test_only_the_completion_and_its_end_are_supervised(tokenizer):
    row = _encode(tokenizer, "say red", " red", 32)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "say", "red", "red", "[SEP]"]
    assert row["labels"][:3] == [-100] * 3
    assert row["labels"][3:] == row["input_ids"][3:]


@pytest.mark.parametrize(("prompt", "completion"), [(50, 3), (3, 50), (50, 50)])
def test_too_long_a_row_keeps_supervised_tokens_and_the_prompts_end(tokenizer, prompt, completion):
    row = _encode(tokenizer, "red " * prompt + "last", " blue" * completion, 16)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert len(tokens) == 16
    supervised = sum(label != -100 for label in row["labels"])
    assert supervised >= 4
    assert tokens[0] == "[CLS]"
    assert tokens[16 - supervised - 1] == "last"


def test_the_loss_is_the_sum_that_transformers_means(tokenizer, build):
    model = build("gpt2")
    ids = torch.randint(3, 97, (3, 8))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    outputs = model(input_ids=ids, labels=labels)
    total, count = SupervisedFineTuning().loss(SimpleNamespace(logits=outputs.logits), {"labels": labels})
    assert int(count) == 4 + 2 + 4
    torch.testing.assert_close(total / count, outputs.loss)


def test_prompts_to_predict_are_padded_on_the_left(tokenizer):
    rows = SupervisedFineTuning().encode([{"prompt": "red"}, {"prompt": "say red blue"}], tokenizer, 16, training=False)
    batch = SupervisedFineTuning().collate(rows, tokenizer, training=False)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert "labels" not in batch
