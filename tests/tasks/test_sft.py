"""Pairs, instructions and conversations as tokens, with the loss on the answers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from lightning_peft import LoRA, PeftModule, SupervisedFineTuning, TextDataModule
from lightning_peft.tasks.counted import LogitsAt
from lightning_peft.tasks.messages import read_messages, read_sharegpt


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def _encode(tokenizer, prompt, completion, max_length):
    return SupervisedFineTuning().encode(
        [{"prompt": prompt, "completion": completion}], tokenizer, max_length, training=True
    )[0]


def _counted(logits, labels):
    where = labels[:, 1:] != -100
    return LogitsAt(logits[:, :-1][where], labels[:, 1:][where])


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
    total, count = SupervisedFineTuning().loss(_counted(outputs.logits, labels), {"labels": labels})
    assert int(count) == 4 + 2 + 4
    torch.testing.assert_close(total / count, outputs.loss)


def test_prompts_to_predict_are_padded_on_the_left(tokenizer):
    rows = SupervisedFineTuning().encode([{"prompt": "red"}, {"prompt": "say red blue"}], tokenizer, 16, training=False)
    batch = SupervisedFineTuning().collate(rows, tokenizer, training=False)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert "labels" not in batch


REPO = Path(__file__).parents[1]
CHATML = (REPO / "data" / "chat_templates" / "chatml.jinja").read_text()


@pytest.fixture(scope="module")
def chatty():
    """A tokenizer with ChatML's tokens, of which the second is the end of a text, and nothing to pad with."""
    folder = REPO / "parity" / "trl_reference"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A tiny model without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(REPO / "parity" / "trl_reference")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _read(tokenizer, row, *, training=True, **options):
    """The whole text and the supervised parts."""
    (feature,) = SupervisedFineTuning(**options).encode([row], tokenizer, 512, training=training)
    labels = feature.get("labels", [])
    runs = itertools.groupby(range(len(labels)), key=lambda i: labels[i] != -100)
    said = [tokenizer.decode([labels[i] for i in run]) for counts, run in runs if counts]
    return tokenizer.decode(feature["input_ids"]), said


ALPACA = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}, {"from": "human", "value": "bye"}]


def test_instructions_are_conversations_where_there_is_a_template_and_alpacas_prompt_where_not(chatty, chat_folder):
    plain = AutoTokenizer.from_pretrained(chat_folder)
    text, said = _read(plain, ALPACA)
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1 2"
        "\n\n### Response:\n3<|im_end|>"
    )
    assert said == ["3<|im_end|>"]
    text, _ = _read(plain, {**ALPACA, "input": ""})
    assert text.startswith("Below is an instruction that describes a task. Write a response")
    assert "### Input" not in text
    text, said = _read(chatty, ALPACA)
    assert text == "<|im_start|>user\nAdd the numbers.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert said == ["3<|im_end|>"]
    assert _read(chatty, {"instruction": "Add."}, training=False)[0].endswith("Add.<|im_end|>\n<|im_start|>assistant\n")


def test_sharegpt_is_read(chatty):
    row = {"conversations": [*SHAREGPT, {"from": "gpt", "value": "see you"}], "system": "Be brief."}
    text, said = _read(chatty, row)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert said == ["hi<|im_end|>", "see you<|im_end|>"]
    assert _read(chatty, {"conversations": json.dumps(SHAREGPT)})[1] == ["hi<|im_end|>"]
    with pytest.raises(ValueError, match=r"unknown 'from' 'gtp' in turn 1.*did you mean 'gpt'"):
        _read(chatty, {"conversations": [{"from": "gtp", "value": "a"}]})
    with pytest.raises(ValueError, match=r"no 'from' and 'value' in turn 1.*data\.columns\.messages=conversations"):
        _read(chatty, {"conversations": [{"role": "user", "content": "a"}]})


def test_sharegpts_calls_are_those_of_messages():
    call = '{"name": "weather", "arguments": {"city": "Bern"}}'
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = read_messages(
        [
            {"role": "user", "content": "Weather?", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}],
            },
            {"role": "tool", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": "Sunny."},
        ]
    )
    assert read_sharegpt(turns) == messages
    assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bern"}}
    with pytest.raises(ValueError, match=r"no JSON in turn 1 of 'conversations': 'weather\(\)'"):
        read_sharegpt([{"from": "function_call", "value": "weather()"}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [{"role": "user", "content": "a"}], "completion": " "}, "empty content of role 'assistant'"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "a text as prompt; give both"),
        ({"instruction": " ", "output": "a"}, "has an empty instruction"),
        ({**ALPACA, "output": ""}, "empty content of role 'assistant' in message 1 of 'output'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of content that is no text"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "only an assistant calls tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "a tool call without a function's name"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "[1]"}, "has a tool that is no object: 1"),
    ],
)
def test_rows_without_an_answer_are_refused(chatty, row, said):
    with pytest.raises(ValueError, match=said):
        _read(chatty, row)


def test_conversations_need_a_template(chat_folder):
    with pytest.raises(RuntimeError, match=r"no chat template; name one with task\.chat_template=zephyr"):
        _read(AutoTokenizer.from_pretrained(chat_folder), {"messages": [{"role": "user", "content": "a"}]})


def test_without_a_padding_token_the_end_is_padded_with_and_still_learnt_once(chatty):
    rows = [{"prompt": "say", "completion": " " + "a" * n} for n in (1, 9)]
    task = SupervisedFineTuning()
    features = task.encode(rows, chatty, 64, training=True)
    batch = task.collate(features, chatty, training=True)
    end = chatty.eos_token_id
    assert (batch["input_ids"][0] == end).sum() > 1
    assert (batch["labels"] == end).sum(-1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [len(f["input_ids"]) for f in features]


def test_a_place_is_named_with_what_the_template_says(chat_folder, tmp_path):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": good}] * 6 + [{"messages": [*good, good[1]]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(tmp_path / "chat.jsonl"), validation_files=str(tmp_path / "chat.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    template = CHATML.replace(
        "{{'<|im_start|>'",
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns!') }}{% endif %}"
        "{{'<|im_start|>'",
    )
    data.connect(SupervisedFineTuning(chat_template=template), tokenizer)
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 7 is refused by the chat template: take turns!"):
        data.setup("fit")


def test_a_template_with_a_token_that_the_tokenizer_lacks_is_one_error_and_no_rows(tokenizer_folder, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(tmp_path / "chat.jsonl"), validation_fraction=0, on_error="skip")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.eos_token is None
    data.connect(SupervisedFineTuning(chat_template="zephyr"), tokenizer)
    with pytest.raises(RuntimeError, match="the chat template writes the eos_token, which the tokenizer does not have"):
        data.setup("fit")


def test_a_tokenizer_of_another_model_is_refused_before_training(chat_folder, tokenizer_folder, tmp_path, trainer):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "weather", "completion": " sunny"}\n' * 2)
    model = {"name_or_path": str(chat_folder), "tokenizer": tokenizer_folder}
    data = TextDataModule(train_files=str(tmp_path / "pairs.jsonl"), validation_files=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ValueError, match=r"the token id \d+ .*, but the model's embedding has 310 rows"):
        trainer().fit(PeftModule(model, LoRA(r=2), "sft"), data)


@pytest.fixture
def questions(tmp_path):
    """Conversations whose answer repeats the question's letter."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": f"{c}{c}"}]}
        for c in "abcdefgh" * 12
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:8]))
    return TextDataModule(
        train_files=str(tmp_path / "chat.jsonl"),
        validation_files=str(tmp_path / "few.jsonl"),
        predict_files=str(tmp_path / "few.jsonl"),
        batch_size=8,
        max_length=48,
    )


@pytest.mark.slow
def test_answers_are_learnt_exported_with_their_template_and_written_again(chat_folder, questions, trainer, tmp_path):
    """The baselines: the untrained base, and always the same answer, which is right once in eight."""
    L.seed_everything(0, verbose=False)
    task = SupervisedFineTuning(chat_template="chatml", predict_with_generate=True)
    method = LoRA(r=16, modules_to_save=["lm_head", "embed_tokens"])
    module = PeftModule(str(chat_folder), method, task, {"lr": 1e-2}, generation={"max_new_tokens": 6})
    before = trainer().validate(module, questions, verbose=False)[0]
    trainer(max_epochs=15, limit_val_batches=0).fit(module, questions)
    run = trainer()
    after = run.validate(module, questions, verbose=False)[0]
    assert before["val/exact_match"] <= 1 / 8
    assert after["val/exact_match"] > 0.9
    assert after["val/rougeL"] == pytest.approx(after["val/exact_match"], abs=0.13)  # one word each
    assert after["val/loss"] < 0.3 * before["val/loss"]
    assert after["val/perplexity"] == pytest.approx(math.exp(after["val/loss"]), rel=1e-4)
    assert after["val/token_accuracy"] > 0.9
    said = [row for batch in run.predict(module, questions) for row in batch]
    answers = [row["messages"][-1]["content"] for row in questions.rows("predict")]
    assert sum(row["completion"] == a for row, a in zip(said, answers, strict=True)) / 8 == after["val/exact_match"]

    folder = module.save_adapter(tmp_path / "adapter")
    assert (folder / "chat_template.jinja").read_text() == task.chat_template
    again = PeftModule.from_adapter(folder)
    assert again.tokenizer.chat_template == task.chat_template
    assert [row for batch in trainer().predict(again, questions) for row in batch] == said
    assert (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_written_answers_are_scored_as_by_hand(chatty):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]}
        for a in ("the cat sat", "a dog", "the end")
    ]
    task = SupervisedFineTuning(predict_with_generate=True)
    batch = task.collate(task.encode(rows, chatty, 64, training=True), chatty, training=True)
    written = ["the cat sat", "a cat", ""]

    class Parrot:
        """Writes what it is told behind whatever it is given."""

        def generate(self, input_ids, attention_mask, **options):
            assert chatty.batch_decode(input_ids) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"] * 3
            assert options["eos_token_id"] == [chatty.eos_token_id]
            ids = [chatty(text)["input_ids"] for text in written]
            longest = max(map(len, ids))
            behind = torch.tensor([i + [chatty.eos_token_id] * (longest - len(i)) for i in ids])
            return torch.cat([input_ids, behind], 1)

    metrics = task.metrics()
    task.score_written(metrics, Parrot(), batch, chatty)
    assert metrics["exact_match"].compute().item() == pytest.approx(1 / 3)
    # "a cat" has one of two words in common with "a dog": precision and recall are a half
    assert metrics["rouge"].compute()["rougeL"].item() == pytest.approx((1 + 0.5 + 0) / 3)
