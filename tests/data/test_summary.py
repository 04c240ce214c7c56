"""What is said of data before it is trained on, against counts made by hand."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from lightning_peft import Seq2Seq, SupervisedFineTuning, TextClassification, TextDataModule, TokenClassification
from lightning_peft.data.summary import summarise

pytestmark = pytest.mark.filterwarnings("ignore:no training row has the label")


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def summary(tmp_path, tokenizer):
    """Writes rows to files and summarises them; ``sample`` and ``examples`` go to the summary."""

    def make(task, train, validation, sample=None, examples=2, stage="fit", **options):
        for name, rows in (("train", train), ("validation", validation)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        files = {f"{n}_files": str(tmp_path / f"{n}.jsonl") for n in ("train", "validation")}
        data = TextDataModule(**files, **{"max_length": 12, "cache_dir": tmp_path / "kept", **options})
        data.connect(task, tokenizer)
        data.setup(stage)
        return summarise(data, sample=sample, examples=examples)

    return make


def _texts(*lengths, label="a"):
    return [{"text": " ".join(["red"] * n), "label": label} for n in lengths]


def test_lengths_labels_and_the_cut_are_counted_over_all_rows(summary):
    train = [*_texts(1, 2, 3, 4), *_texts(20, 30, label="b")]
    found = summary(TextClassification(), train, _texts(5, 6, label="b")).splits["train"]
    lengths = found.spreads["length"]  # [CLS] and [SEP] are two tokens more
    assert (found.examples, found.tokens.all, found.tokens.supervised) == (6, 3 + 4 + 5 + 6 + 12 + 12, None)
    assert (lengths.smallest, lengths.median, lengths.high, lengths.largest) == (3, 5, 12, 12)
    assert sum(lengths.counts) == 6
    assert lengths.edges[-1] == 13
    assert found.labels == {"a": 4, "b": 2}
    assert (found.tokens.cut.looked_at, found.tokens.cut.rows, found.tokens.cut.tokens_lost) == (
        6,
        2,
        (22 - 12) + (32 - 12),
    )
    assert found.tokens.cut.tokens == 3 + 4 + 5 + 6 + 22 + 32


def test_supervised_tokens_that_the_cut_loses_are_counted_exactly(summary):
    pairs = [{"prompt": "blue " * p, "completion": "red " * c} for p, c in ((1, 2), (20, 2), (2, 30))]
    found = summary(SupervisedFineTuning(), pairs, pairs[:1])
    train = found.splits["train"]
    # [CLS] before the prompt and [SEP] after the completion; the second row loses of its prompt alone
    assert train.tokens.supervised == 3 + 3 + 9
    assert train.tokens.all == 5 + 12 + 12
    assert (train.tokens.cut.rows, train.tokens.cut.supervised, train.tokens.cut.supervised_lost) == (
        2,
        3 + 3 + 31,
        31 - 9,
    )
    assert train.tokens.cut.tokens_lost == (1 + 20 + 3 - 12) + (1 + 2 + 31 - 12)
    # a token less takes 2 of 37, which is more than a twentieth
    assert train.tokens.cut.enough == 1 + 2 + 31 - 1
    assert any(note.startswith("train: the cut to data.max_length=12 loses 59.5%") for note in found.notes)


def test_duplicates_leaks_and_labels_that_training_lacks_are_found(summary):
    train = [*_texts(1, 2, 2, 3), *_texts(3, 4, label="b")]
    validation = [*_texts(2, 9), *_texts(1, label="b"), *_texts(7, label="c")]
    found = summary(TextClassification(labels=["a", "b", "c"]), train, validation)
    train, validation = found.splits["train"], found.splits["validation"]
    assert (train.duplicates, train.same_inputs) == (1, 1)
    assert (validation.in_training, validation.inputs_in_training) == (1, 1)
    assert "validation: 25.0% of its rows are trained on too, so its metrics flatter the model." in found.notes
    assert "validation: no training row has the label 'c'." in found.notes


def test_an_example_is_shown_with_what_is_learnt_apart(summary):
    rows = [{"prompt": "say blue :", "completion": "red green"}]
    (shown,) = summary(SupervisedFineTuning(), rows, rows, examples=5).examples
    pieces = shown.text.sequences["input"]
    assert [(p.text.strip(), p.supervised) for p in pieces] == [("[CLS] say blue :", False), ("red green [SEP]", True)]
    assert (shown.text.tokens, shown.text.supervised, shown.text.whole) == (7, 3, 7)
    assert shown.place.endswith("train.jsonl, line 1")
    (shown,) = summary(TextClassification(labels=["a", "b"]), _texts(20), _texts(1), examples=1).examples
    assert (shown.text.tokens, shown.text.whole, shown.targets) == (12, 22, {"label": "a"})


def test_a_sample_says_how_many_rows_it_has_and_the_same_ones_are_taken_again(summary):
    train = _texts(*range(1, 31))
    first = summary(TextClassification(labels=["a", "b"]), train, train[:1], sample=10)
    again = summary(TextClassification(labels=["a", "b"]), train, train[:1], sample=10)
    assert first == again
    assert first.splits["train"].tokens.cut.looked_at == 10
    assert first.splits["train"].examples == 30


def test_of_a_stream_its_beginning_is_looked_at(summary):
    train = [*_texts(*range(1, 31)), *_texts(3, label="b")]
    found = summary(TextClassification(), train, train, sample=8, streaming=True).splits
    assert found["train"].streamed
    assert (found["train"].examples, found["validation"].examples) == (8, 31)


@pytest.mark.filterwarnings("ignore:(?s).*left out")
def test_rows_that_are_left_out_do_not_shift_the_others(summary):
    pairs = [{"prompt": f"say {i}", "completion": "" if i == 1 else f"red {i}"} for i in range(4)]
    found = summary(SupervisedFineTuning(), pairs, pairs, examples=3, on_error="skip")
    assert [s.place.rpartition(" ")[2] for s in found.examples] == ["1", "3", "4"]
    assert ["red 2" in s.text.sequences["input"][1].text for s in found.examples] == [False, True, False]


class _Tagging(SupervisedFineTuning):
    """Every second token has a class; its number is stored at its place."""

    def to_config(self):
        return {"name": "tagging"}

    def model_kwargs(self):
        return {"id2label": {0: "O", 1: "COLOUR"}}

    def encode(self, rows, tokenizer, max_length, *, training):
        ids = [tokenizer(r["prompt"], truncation=True, max_length=max_length)["input_ids"] for r in rows]
        return [{"input_ids": i, "labels": [-100, *[n % 2 for n in range(len(i) - 2)], -100]} for i in ids]


class _Translating(SupervisedFineTuning):
    """Source and target are sequences of their own."""

    def to_config(self):
        return {"name": "translating"}

    def encode(self, rows, tokenizer, max_length, *, training):
        cut = {"truncation": True, "max_length": max_length}
        sides = [(tokenizer(r["prompt"], **cut), tokenizer(r["completion"], **cut)) for r in rows]
        return [{"input_ids": s["input_ids"], "labels": t["input_ids"]} for s, t in sides]


def test_classes_of_tokens_and_targets_of_their_own_are_told_from_texts_that_go_on(summary):
    rows = [{"prompt": "red blue green", "completion": "one two"}, {"prompt": "red", "completion": "one two"}]
    (shown, _) = summary(_Tagging(), rows, rows).examples
    tags = [(p.text.strip(), p.tag) for p in shown.text.sequences["input"] if p.supervised]
    assert tags == [("red", "O"), ("blue", "COLOUR"), ("green", "O")]
    found = summary(_Translating(), rows, rows)
    assert {n: s.largest for n, s in found.splits["train"].spreads.items()} == {
        "length of input": 5,
        "length of target": 4,
    }
    assert found.splits["train"].tokens.supervised == 8
    assert [p.supervised for p in found.examples[0].text.sequences["target"]] == [True]


def test_what_a_target_loses_by_the_tasks_own_length_is_counted(summary):
    rows = [{"source": "red", "target": "blue " * n} for n in (2, 20)]
    found = summary(Seq2Seq(max_target_length=6), rows, rows)
    train = found.splits["train"]
    assert train.tokens.supervised == 4 + 6  # [CLS] and [SEP] are targets too
    assert (train.tokens.cut.rows, train.tokens.cut.supervised, train.tokens.cut.supervised_lost) == (1, 26, 16)
    assert any("and the task's own loses 61.5% of what is learnt" in note for note in found.notes)


def test_tags_of_words_are_balanced_supervised_and_cut(summary):
    def rows(*lengths):
        return [{"tokens": ["red", *["blue"] * (n - 1)], "tags": ["B-X", *["O"] * (n - 1)]} for n in lengths]

    found = summary(TokenClassification(), rows(2, 3, 30), rows(4))
    train = found.splits["train"]
    assert train.labels == {"O": 32, "B-X": 3}
    assert train.tokens.supervised == 2 + 3 + 10  # of twelve tokens two are [CLS] and [SEP]
    cut = train.tokens.cut
    assert (cut.rows, cut.tokens_lost, cut.supervised, cut.supervised_lost) == (1, 20, 35, 20)
    assert any("loses 57.1% of what is learnt" in note for note in found.notes)
    words = [(p.text.strip(), p.tag) for s in found.examples for p in s.text.sequences["input"] if p.supervised]
    assert words[0] == ("red", "B-X")
    assert set(words[1:]) == {("red", "B-X"), ("blue", "O")}


def test_looking_changes_neither_the_batches_nor_the_random_state(summary, tmp_path, tokenizer):
    def batches(look):
        data = TextDataModule(train_files=tmp_path / "train.jsonl", batch_size=2, cache_dir=tmp_path / "kept")
        data.connect(TextClassification(), tokenizer)
        data.setup("fit")
        torch.manual_seed(0)
        if look:
            summarise(data)
        return [b["input_ids"].tolist() for b in data.train_dataloader()], torch.rand(1).item()

    rows = [*_texts(*range(1, 20)), *_texts(3, label="b")]
    summary(TextClassification(), rows, rows)
    assert batches(look=True) == batches(look=False)
