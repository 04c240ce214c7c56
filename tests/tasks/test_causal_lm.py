"""Plain text in blocks: every token once, every byte counted."""

from __future__ import annotations

import itertools
import json
import math

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_peft import CausalLM, LoRA, PeftModule, TextDataModule
from lightning_peft.tasks.counted import LogitsAt

TEXTS = ["The cat sat.", "Grüße, 你好 🦊! " * 5, "  two  spaces ", "a"]


@pytest.fixture(params=["bytes", "bytes with a beginning", "word pieces"])
def tokenizer(request, tokenizer_folder):
    """Text after text, text that begins with a token of its own, and one that drops spaces and accents."""
    if request.param == "word pieces":
        return AutoTokenizer.from_pretrained(tokenizer_folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["the cat sat on the mat"],
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<b>", "<e>"]),
    )
    if request.param == "bytes":
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    made.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<b>", eos_token="<e>")


def _blocks(tokenizer, texts, length):
    task = CausalLM()
    features = task.encode([{"text": t} for t in texts], tokenizer, length, training=True)
    return list(task.join(features, tokenizer, length))


def _counted(logits, labels):
    where = labels[:, 1:] != -100
    return LogitsAt(logits[:, :-1][where], labels[:, 1:][where])


@pytest.mark.parametrize("length", [4, 7, 16, 10_000])
def test_every_token_is_predicted_once_and_every_byte_counted(tokenizer, length):
    blocks = _blocks(tokenizer, TEXTS, length)
    assert all(len(b["input_ids"]) == length for b in blocks[:-1])
    assert 2 <= len(blocks[-1]["input_ids"]) <= length
    predicted = [t for b in blocks for t in b["input_ids"][1:]]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    first = [t for t in tokenizer("")["input_ids"][:1] if t != end]
    stream = [
        token for text in TEXTS for token in [*first, *tokenizer(text, add_special_tokens=False)["input_ids"], end]
    ]
    assert predicted == (stream[1:] if first else stream)
    assert blocks[0]["input_ids"][0] == (first[0] if first else end)
    assert sum(b["bytes"] for b in blocks) == sum(len(t.encode()) for t in TEXTS)
    assert all(before["input_ids"][-1] == after["input_ids"][0] for before, after in itertools.pairwise(blocks))


def test_the_bytes_of_a_block_are_those_of_its_tokens():
    made = Tokenizer(models.WordLevel({"[U]": 0, "aa": 1, "é": 2, "[E]": 3}, unk_token="[U]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[E]", unk_token="[U]")
    (feature,) = CausalLM().encode([{"text": "aa  é unknown\n"}], tokenizer, 8, training=True)
    assert feature == {"input_ids": [1, 2, 0, 3], "bytes": [2, 4, 9, 0]}
    blocks = list(CausalLM().join([feature], tokenizer, 3))
    assert blocks == [{"input_ids": [3, 1, 2], "bytes": 6}, {"input_ids": [2, 0, 3], "bytes": 9}]


def test_the_metrics_are_those_of_all_texts_whatever_the_batches(tokenizer):
    blocks = _blocks(tokenizer, TEXTS, 7)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(tokenizer), len(tokenizer) if len(tokenizer) < 1000 else 1, generator=generator)
    table = table if table.shape[1] > 1 else table.expand(-1, len(tokenizer))
    found = []
    for size in (1, 3):
        task = CausalLM()
        metrics, total, count = task.metrics(), 0.0, 0
        for i in range(0, len(blocks), size):
            batch = task.collate(blocks[i : i + size], tokenizer, training=True)
            outputs = _counted(table[batch["input_ids"]], batch["labels"])
            task.update(metrics, outputs, batch)
            part, n = task.loss(outputs, batch)
            total, count = total + part.item(), count + int(n)
        values = metrics.compute()
        found.append({**values, **task.from_loss(torch.tensor(total / count), values)})
    size = sum(len(t.encode()) for t in TEXTS)
    assert count == sum(len(b["input_ids"]) - 1 for b in blocks)
    for values in found:
        assert values["bits_per_byte"].item() == pytest.approx(total / math.log(2) / size, rel=1e-5)
        assert values["perplexity"].item() == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found[0]["token_accuracy"].item() == pytest.approx(found[1]["token_accuracy"].item())


def test_the_loss_is_the_one_that_transformers_means(tokenizer, build):
    model = build("gpt2")
    blocks = [{"input_ids": [i % 90 + 3 for i in range(n)], "bytes": n} for n in (9, 5)]
    batch = CausalLM().collate(blocks, tokenizer, training=True)
    total, count = CausalLM().loss(CausalLM().outputs(model, batch), batch)
    wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert int(count) == 8 + 4
    torch.testing.assert_close(total / count, wanted)


def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"has no text: ' \\n'"):
        CausalLM().encode([{"text": "a"}, {"text": " \n"}], tokenizer, 8, training=True)


def test_texts_are_continued_from_their_end(tokenizer):
    rows = CausalLM().encode([{"text": "the cat"}, {"text": "the cat " * 20}], tokenizer, 8, training=False)
    assert len(rows[1]["input_ids"]) == 8
    assert (
        rows[0]["input_ids"] == tokenizer("the cat", add_special_tokens=True)["input_ids"][: len(rows[0]["input_ids"])]
    )
    batch = CausalLM().collate(rows, tokenizer, training=False)
    assert batch["attention_mask"][0, 0] == 0
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_a_model_learns_a_text_well_below_the_frequencies_of_its_tokens(llama_folder, tmp_path, trainer):
    """The baseline is the best that a model could do which does not look at what stands before."""
    L.seed_everything(0, verbose=False)
    lines = ["one two three four five six seven", "seven six five four three two one", "red green blue"]
    (tmp_path / "train.txt").write_text("\n".join(lines * 150))
    (tmp_path / "validation.txt").write_text("\n".join(lines * 4))
    module = PeftModule(str(llama_folder), LoRA(r=8, modules_to_save=["lm_head"]), "causal_lm", {"lr": 1e-2})
    data = TextDataModule(
        train_files=str(tmp_path / "train.txt"),
        validation_files=str(tmp_path / "validation.txt"),
        max_length=32,
        batch_size=4,
    )
    run = trainer(max_epochs=5)
    run.fit(module, data)
    metrics = run.validate(module, data, verbose=False)[0]
    assert len(data.rows("train")) == 1  # a file is one text
    words = " ".join(lines * 4).split()
    frequencies = [words.count(w) / len(words) for w in words]
    baseline = -sum(map(math.log, frequencies)) / len(words)
    assert metrics["val/loss"] < 0.5 * baseline
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-4)
    size = len((tmp_path / "validation.txt").read_bytes())
    tokens = len(words) + 2  # the lines' ends are spaces to this tokenizer; a beginning and an end of text
    nats = metrics["val/loss"] * (tokens - 1)
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    (said,) = run.predict(module, data)[0]
    assert set(said) == {"continuation"}


def test_rows_of_tables_are_texts_too(llama_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"red {i}"}) + "\n" for i in range(30)))
    data = TextDataModule(train_files=str(tmp_path / "a.jsonl"), max_length=16)
    data.connect(CausalLM(), AutoTokenizer.from_pretrained(llama_folder))
    data.setup("fit")
    lengths = data._features["train"]["length"][:].tolist()
    assert lengths[:-1] == [16] * (len(lengths) - 1)
    assert len(lengths) == 7  # 24 texts of four tokens, of which each block of 16 predicts 15
