"""Batches of similar length in a repeatable order."""

from __future__ import annotations

import random

import pytest

from lightning_peft import SupervisedFineTuning, TextClassification, TextDataModule
from lightning_peft.data.batching import LengthGroupedBatches


@pytest.fixture
def lengths():
    shuffler = random.Random(0)
    return [shuffler.randint(1, 60) for _ in range(203)]


def test_every_row_comes_once_an_epoch_and_neighbours_are_alike(lengths):
    batches = LengthGroupedBatches(lengths, 8, seed=0)
    found = list(batches)
    assert sorted(i for b in found for i in b) == list(range(203))
    assert len(found) == len(batches) == 26
    padded = sum(len(b) * max(lengths[i] for i in b) for b in found)
    assert padded < 1.15 * sum(lengths)


def test_the_order_depends_on_seed_and_epoch_alone(lengths):
    def order(seed, epoch):
        batches = LengthGroupedBatches(lengths, 8, seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_ranks_share_the_rows_and_none_waits_for_another(lengths, monkeypatch):
    from lightning_peft.data import batching

    shares = []
    for rank in range(3):
        monkeypatch.setattr(batching, "ranks", lambda rank=rank: (rank, 3))
        shares.append(list(LengthGroupedBatches(lengths, 8, seed=0)))
    assert len({len(s) for s in shares}) == 1
    assert [[len(b) for b in s] for s in shares] == [[len(b) for b in shares[0]]] * 3
    assert {i for s in shares for b in s for i in b} == set(range(203))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches_whatever_the_workers(tokenizer_folder, workers):
    from transformers import AutoTokenizer

    data = TextDataModule(limit=40, num_workers=workers, max_length=16)
    data.connect(TextClassification(), AutoTokenizer.from_pretrained(tokenizer_folder))
    data.setup("fit")
    first = [b["input_ids"].tolist() for b in data.train_dataloader()]
    again = TextDataModule(limit=40, max_length=16)
    again.connect(TextClassification(), data.tokenizer)
    again.setup("fit")
    assert first == [b["input_ids"].tolist() for b in again.train_dataloader()]


def test_a_limit_on_the_training_rows_leaves_all_labels_known(tmp_path, tokenizer_folder):
    import json

    from transformers import AutoTokenizer

    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {i}", "label": f"kind{i % 20:02}"} for i in range(200)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = TextClassification()
    data = TextDataModule(train_files=path, limit=3)
    data.connect(task, AutoTokenizer.from_pretrained(tokenizer_folder))
    data.setup("fit")
    assert len(data.rows("train")) == 3
    assert task.labels == sorted({r["label"] for r in rows})


def test_equal_texts_never_land_on_both_sides_of_a_split(tmp_path, tokenizer_folder):
    import json

    from transformers import AutoTokenizer

    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {i % 10}", "label": str(i % 2)} for i in range(60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(path))
    data.connect(TextClassification(), AutoTokenizer.from_pretrained(tokenizer_folder))
    data.setup("fit")
    train, validation = ({r["text"] for r in data.rows(s)} for s in ("train", "validation"))
    assert not train & validation
    assert len(data.rows("train")) + len(data.rows("validation")) == 60


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["same"] * 20, "20 rows that all have the same 'text' are too few to split .* validation_files"),
        (["one"], "1 row is too few to split"),
        (["same"] * 19 + ["other"], None),
    ],
)
def test_rows_that_cannot_be_split_say_that_their_inputs_are_equal(tmp_path, tokenizer_folder, texts, said):
    import json

    from transformers import AutoTokenizer

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": str(i % 2)}) + "\n" for i, t in enumerate(texts)))
    data = TextDataModule(train_files=str(path))
    data.connect(TextClassification(), AutoTokenizer.from_pretrained(tokenizer_folder))
    if said is None:
        data.setup("fit")
        assert sorted(len(data.rows(split)) for split in ("train", "validation")) == [1, 19]
        return
    with pytest.raises(ValueError, match=said):
        data.setup("fit")


def test_wrong_numbers_are_all_named_at_once():
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more, but got 0; .*max_length must be 4 or more"):
        TextDataModule(batch_size=0, max_length=1)


def test_an_unknown_label_and_an_empty_completion_name_their_row(tmp_path, tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    (tmp_path / "train.csv").write_text("text,label\na,spam\nb,ham\n")
    (tmp_path / "val.csv").write_text("text,label\na,spam\nb,hamm\n")
    data = TextDataModule(train_files=str(tmp_path / "train.csv"), validation_files=str(tmp_path / "val.csv"))
    data.connect(TextClassification(), tokenizer)
    with pytest.raises(
        ValueError, match=r"val\.csv.*, line 3 has the label 'hamm', which training does not know; did you"
    ):
        data.setup("fit")
    (tmp_path / "pairs.csv").write_text("prompt,completion\na,b\nc,\nd,e\nf,g\n")
    files = str(tmp_path / "pairs.csv")
    data = TextDataModule(train_files=files, validation_files=files)
    data.connect(SupervisedFineTuning(), tokenizer)
    with pytest.raises(ValueError, match=r"pairs\.csv, line 3 has no supervised token"):
        data.setup("fit")
