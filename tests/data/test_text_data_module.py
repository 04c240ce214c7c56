"""From files to batches: kept token ids, streams, and rows that cannot be used."""

from __future__ import annotations

import json
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from lightning_peft import LoRA, PeftModule, SupervisedFineTuning, TextClassification, TextDataModule
from lightning_peft.data import encoding
from lightning_peft.data.files import Example

pytestmark = pytest.mark.filterwarnings("ignore:no training row has the label")


@pytest.fixture
def files(tmp_path):
    rows = [{"text": f"red {i}" if i % 2 else f"blue {i}", "label": "ab"[i % 2]} for i in range(40)]
    for name, part in (("train", rows[:32]), ("validation", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return {f"{name}_files": str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}


@pytest.fixture
def module(tokenizer_folder, tmp_path):
    def make(task=None, **options):
        data = TextDataModule(**{"cache_dir": tmp_path / "kept", "batch_size": 4, **options})
        data.connect(task or TextClassification(), AutoTokenizer.from_pretrained(tokenizer_folder))
        data.setup("fit")
        return data

    return make


def test_token_ids_are_made_once_and_again_when_what_they_depend_on_changes(files, module, monkeypatch):
    made = []
    chunk = encoding.Encoder.chunk
    monkeypatch.setattr(encoding.Encoder, "chunk", lambda self, rows: made.append(len(rows)) or chunk(self, rows))
    first = next(iter(module(**files).train_dataloader()))
    assert made == [32, 8]
    again = next(iter(module(**files).train_dataloader()))
    assert made == [32, 8]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    module(**files, max_length=4)
    module(TextClassification(labels=["b", "a"]), **files)
    assert made == [32, 8, 32, 8, 32, 8]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("truncation_side", "left"),
        ("model_input_names", ["input_ids", "attention_mask"]),
        ("split_special_tokens", True),
        ("tgt_lang", "deu_Latn"),
    ],
)
def test_what_a_tokenizer_is_told_when_it_is_called_is_part_of_the_key(tokenizer_folder, name, value):
    keys = []
    for told in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        if told:
            setattr(tokenizer, name, value)
        task = TextClassification(labels=["a", "b"])
        keys.append(encoding.Encoder(task, tokenizer, 8, training=True).key([Example({"text": "red"}, "line 1")]))
    assert keys[0] != keys[1]


def test_several_processes_give_the_same_token_ids(files, module, monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "_CHUNK", 10)
    one, two = (module(**files, num_proc=n, cache_dir=tmp_path / str(n)) for n in (1, 2))
    for first, second in zip(one.train_dataloader(), two.train_dataloader(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_that_cannot_be_used_are_left_out_on_demand_and_counted(tmp_path, module):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "" if i in (3, 5) else "red"} for i in range(20)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    options = {"train_files": path, "validation_files": path}
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 21 is no JSON.*data\.on_error=skip leaves such rows out"):
        module(SupervisedFineTuning(), **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = module(SupervisedFineTuning(), **options, on_error="skip")
    text = "\n".join(str(w.message) for w in said)
    assert "2 of 20 rows cannot be used" in text
    assert "line 4 has no supervised token" in text
    assert sum(len(b["input_ids"]) for b in data.train_dataloader()) == 18


def _saved_with_test_labels(folder, labels):
    import datasets

    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {"train": [0, 1] * 4, "validation": [0, 1], "test": labels}
    rows = {
        name: {"text": [f"red {name} {i}" for i in range(len(some))], "label": some} for name, some in parts.items()
    }
    datasets.DatasetDict({n: datasets.Dataset.from_dict(r, features=kinds) for n, r in rows.items()}).save_to_disk(
        folder
    )


def test_a_source_that_keeps_its_test_labels_to_itself_can_be_trained_on(tmp_path, module):
    _saved_with_test_labels(tmp_path / "glue", [-1, -1, -1])
    data = module(source=str(tmp_path / "glue"))
    assert len(data.rows("validation")) == 2
    with pytest.raises(ValueError, match=r"no row of the test split of '.*glue' has anything in the column 'label'"):
        data.setup("test")


def test_a_test_row_without_its_label_is_named_where_others_have_theirs(tmp_path, module):
    _saved_with_test_labels(tmp_path / "mixed", [0, -1, 1])
    with pytest.raises(ValueError, match="test, row 2 has nothing in the column 'label'"):
        module(source=str(tmp_path / "mixed")).setup("test")


def test_a_model_is_judged_on_the_rows_that_are_given_and_on_no_others(files, tokenizer_folder, tmp_path):
    def data(**options):
        made = TextDataModule(None, cache_dir=tmp_path / "kept", **options)
        made.connect(TextClassification(labels=["a", "b"]), AutoTokenizer.from_pretrained(tokenizer_folder))
        return made

    held_out = files["validation_files"]
    for stage, split in (("validate", "validation"), ("test", "test")):
        alone = data(**{f"{split}_files": held_out})
        alone.setup(stage)
        assert (len(alone.rows(split)), alone.splits) == (8, [split])
    for stage, said in (
        ("fit", "no rows to train on: give train_files"),
        ("validate", "no rows to validate with: give validation_files"),
        ("predict", "no rows to predict: give predict_files or validation_files"),
    ):
        with pytest.raises(ValueError, match=said):
            data(test_files=held_out).setup(stage)
    with pytest.raises(ValueError, match=r"no rows to test with: give test_files; .* split=validation"):
        data(**files).setup("test")
    with pytest.raises(ValueError, match="give a source or train_files"):
        TextDataModule(None)


@pytest.mark.parametrize("streaming", [False, True])
def test_all_rows_are_trained_on_where_no_share_validates(files, module, streaming):
    task = TextClassification(labels=["a", "b"])
    data = module(task, train_files=files["train_files"], validation_fraction=0, streaming=streaming)
    assert sum(len(b["labels"]) for b in data.train_dataloader()) == 32
    assert data.val_dataloader() == []


@pytest.mark.parametrize(("limit", "left"), [(0.25, 8), (5, 5), (1, 1), (400, 32)])
def test_a_number_or_a_share_of_the_rows(files, module, limit, left):
    assert len(module(**files, limit=limit).rows("train")) == left


def test_a_stream_gives_every_row_once_in_an_order_of_seed_and_epoch(files, module):
    def unpadded(batches, tokenizer):
        return [row for b in batches for row in tokenizer.batch_decode(b["input_ids"], skip_special_tokens=True)]

    def texts(epoch, **options):
        data = module(**files, streaming=True, shuffle_buffer=10, **options)
        loader = data.train_dataloader()
        loader.dataset.set_epoch(epoch)
        return unpadded(loader, data.tokenizer)

    first, data = texts(0), module(**files)
    assert len(first) == 32
    assert sorted(first) == sorted(unpadded(data.train_dataloader(), data.tokenizer))
    assert first == texts(0) != texts(1)
    assert first != texts(0, seed=3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("streaming", [True, False])
def test_a_resumed_run_sees_what_it_would_have_seen(files, bert_folder, tmp_path, streaming):
    def run(steps, path=None):
        seen = []

        class Seen(L.Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                seen.append(batch["input_ids"].tolist())

        L.seed_everything(0)
        module = PeftModule(str(bert_folder), LoRA(r=2), scheduler={"name": "constant", "warmup": 0.0})
        saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=5, save_top_k=-1)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[Seen(), saved], limit_val_batches=0, **options
        )
        stream = {"streaming": True, "shuffle_buffer": 8} if streaming else {}
        data = TextDataModule(**files, **stream, batch_size=4, cache_dir=tmp_path / "kept")
        trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return seen

    whole = run(21)  # eight batches an epoch
    assert whole[:5] != whole[8:13] != whole[16:]  # each in an order of its own
    assert run(21, tmp_path / "saved" / "step=5.ckpt") == whole[5:]
    assert run(21, tmp_path / "saved" / "step=10.ckpt") == whole[10:]
    if not streaming:  # ended within an epoch, not only saved there
        run(13)
        assert run(21, tmp_path / "13.ckpt") == whole[13:]


def test_a_stream_stops_at_a_row_that_cannot_be_used(files, module, tmp_path):
    with open(files["train_files"], "a") as file:
        file.write('{"text": "green"}\n')
    data = module(**files, streaming=True)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 33 has no column 'label'"):
        list(data.train_dataloader())
    data = module(**files, streaming=True, on_error="skip")
    with pytest.warns(UserWarning, match=r"line 33 has no column 'label'.*left out"):
        assert len(list(data.train_dataloader())) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"streaming": True}, "give validation_files"),
        ({"columns": {"txt": "sentence"}}, "the task knows no column 'txt'; did you mean 'text'"),
    ],
)
def test_what_has_no_meaning_is_said_before_anything_is_read(files, module, options, said):
    with pytest.raises(ValueError, match=said):
        module(train_files=files["train_files"], **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 1.5}, "limit must be a number of rows, or a share above 0 and below 1, but got 1.5"),
        ({"limit": 1.0}, r"limit=1\.0 could be one row or all of them"),
        ({"on_error": "ignore"}, "on_error must be raise or skip, but got 'ignore'"),
        ({"streaming": True, "num_workers": 2}, "num_workers must be 0"),
        ({"streaming": True, "limit": 3}, "leave limit out"),
    ],
)
def test_options_out_of_their_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TextDataModule(**options)


class _NothingLearnt(SupervisedFineTuning):
    """Learns of the rows that say so."""

    def to_config(self):
        return {"name": "nothing_learnt"}

    def encode(self, rows, tokenizer, max_length, *, training):
        features = super().encode(rows, tokenizer, max_length, training=training)
        for row, feature in zip(rows, features, strict=True):
            if row["completion"] == "mute":
                feature["labels"] = [-100] * len(feature["labels"])
        return features


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (
            TextClassification(labels=["a", "b"]),
            {"text": "  ", "label": "a"},
            "line 2 is empty: no token is left of it",
        ),
        (
            _NothingLearnt(),
            {"prompt": "red", "completion": "mute"},
            "line 2 has no supervised token within max_length=64",
        ),
        (
            TextClassification(labels=["a", "b"]),
            {"text": "red", "label": "B"},
            "line 2 has the label 'B', which training",
        ),
    ],
)
def test_a_row_with_nothing_to_read_or_to_learn_is_named_or_left_out(tmp_path, module, task, row, said):
    good = {"text": "red", "label": "a", "prompt": "red", "completion": "blue"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, row, good)))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {said}"):
        module(task, train_files=path, validation_files=path)
    with pytest.warns(UserWarning, match=rf"{said}.*left out"):
        data = module(task, train_files=path, validation_files=path, on_error="skip")
    assert len(data.rows("train")) == len(data.features("train")) == 2


def test_predictions_stand_beside_the_rows_that_were_kept(tmp_path, tokenizer_folder):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "red"}\n{"prompt": 3, "completion": 1}\n{"text": "blue"}\n{"prompt": "green"}\n')
    data = TextDataModule(predict_files=path, source=None, on_error="skip", cache_dir=tmp_path / "kept")
    data.connect(SupervisedFineTuning(), AutoTokenizer.from_pretrained(tokenizer_folder))
    with pytest.warns(UserWarning, match="line 3 has no column 'prompt'"):
        data.setup("predict")
    assert [str(r["prompt"]) for r in data.rows("predict")] == ["red", "3", "green"]
    assert len(data.features("predict")) == 3
    assert [e.number for e in data.examples("predict")] == [0, 1, 3], "places among the rows of the file"
