"""Answers at each validation."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_peft import (
    LoRA,
    PeftModule,
    PrefixTuning,
    PromptTuning,
    SupervisedFineTuning,
    TextClassification,
    TextDataModule,
)
from lightning_peft.callbacks.generation_samples import GenerationSamples, _expected

WORDS = ("red", "green", "blue", "small", "large")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"say {WORDS[i % 5]}:",
            "completion": f"{WORDS[i % 5]} {WORDS[i % 3]}",
            "text": f"red {i}",
            "label": i % 2,
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return lambda: TextDataModule(train_files=str(path), batch_size=4, max_length=24)


@pytest.fixture
def fit(llama_folder, data, trainer):
    """Trains two epochs with dropout; gives the module."""

    def run(*callbacks, method=None, task="sft", **options):
        torch.manual_seed(0)
        module = PeftModule(
            str(llama_folder), method or LoRA(r=2, lora_dropout=0.2), task, generation={"max_new_tokens": 6}
        )
        trainer(*callbacks, **options).fit(module, data())
        return module

    return run


def _lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_same_rows_are_answered_at_each_validation_beside_what_was_expected(fit, tmp_path, capsys):
    module = fit(GenerationSamples(tmp_path, rows=2))
    lines = _lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1]
    assert [line["step"] for line in lines] == [5, 5, 10, 10]
    assert [line["id"] for line in lines[:2]] == [line["id"] for line in lines[2:]]
    rows = {r["id"]: r for r in module.trainer.datamodule.rows("validation")}
    for line in lines:
        row = rows[line["id"]]
        assert line["prompt"] == f"[CLS] say {row['prompt'].split()[1][:-1]} :"
        assert line["expected"] == row["completion"]
        assert line["written"]
    said = capsys.readouterr().out
    assert f"written   {lines[-1]['written']}" in said
    assert f"expected  {lines[-1]['expected']}" in said


def test_of_a_conversation_the_answer_to_its_own_prompt_is_expected(llama_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    said = [
        ("short", ["red", "green", "blue", "large small"]),
        ("cut", ["red", "green", "blue " * 40, "large small"]),
        ("unanswered", ["red", "green", "blue"]),
    ]
    roles = ["user", "assistant", "user", "assistant"]
    rows = [
        {"id": name, "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
        for name, texts in said
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(path), validation_files=str(path), max_length=32, cache_dir=tmp_path / "kept")
    data.connect(SupervisedFineTuning("chatml"), tokenizer)
    data.setup("fit")
    expected = {row["id"]: _expected(data, number) for number, row in enumerate(rows)}
    assert expected == {"short": "large small", "cut": "large small", "unanswered": None}


@pytest.mark.parametrize("generation", [{}, {"do_sample": True, "temperature": 3.0}], ids=["greedy", "sampled"])
def test_training_is_bit_for_bit_what_it_is_without_and_the_answers_are_the_same_again(fit, tmp_path, generation):
    without = fit().state_dict()
    drawn = torch.rand(1)
    for name in ("once", "again"):
        with_it = fit(GenerationSamples(tmp_path / name, generation=generation)).state_dict()
        assert all(torch.equal(t, without[n]) for n, t in with_it.items())
        assert torch.equal(torch.rand(1), drawn), "the global generator stands where it stood"
    assert _lines(tmp_path / "once") == _lines(tmp_path / "again")


def test_another_seed_draws_other_answers(fit, tmp_path):
    for seed in (0, 1):
        sampled = {"do_sample": True, "temperature": 3.0}
        fit(GenerationSamples(tmp_path / str(seed), generation=sampled, seed=seed), max_epochs=1)
    first, second = (_lines(tmp_path / str(seed)) for seed in (0, 1))
    assert [line["prompt"] for line in first] == [line["prompt"] for line in second]
    assert [line["written"] for line in first] != [line["written"] for line in second]


@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4)], ids=["prompts", "prefixes"])
def test_the_answers_are_those_that_prediction_gives(fit, data, trainer, tmp_path, method):
    module = fit(GenerationSamples(tmp_path, rows=5), method=method, max_epochs=1)
    answers = [r["completion"] for batch in trainer().predict(module, data()) for r in batch]
    rows = [r["id"] for r in module.trainer.datamodule.rows("predict")]
    expected = dict(zip(rows, answers, strict=True))
    assert {line["id"]: line["written"] for line in _lines(tmp_path)} == {
        line["id"]: expected[line["id"]] for line in _lines(tmp_path)
    }


def test_a_model_that_does_not_write_is_left_alone(fit, tmp_path):
    fit(GenerationSamples(tmp_path / "out"), task=TextClassification(), max_epochs=1)
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_the_answers_as_a_table(fit, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(GenerationSamples(tmp_path), max_epochs=1, logger=TensorBoardLogger(tmp_path, name="", version="logs"))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    (logged,) = events.Tensors("val/samples/text_summary")
    text = logged.tensor_proto.string_val[0].decode()
    assert logged.step == 5
    for line in _lines(tmp_path):
        assert f"| {line['id']} | {line['prompt']} | {line['expected']} |" in text


@pytest.mark.slow
def test_weights_and_biases_gets_a_table_at_each_validation(fit, tmp_path):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="samples", save_dir=str(tmp_path), offline=True)
    fit(GenerationSamples(tmp_path, rows=2), logger=logger)
    logger.experiment.finish()
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")]
    assert [t["columns"] for t in tables] == [["id", "prompt", "expected", "written"]] * 2
    cells = sorted(row for table in tables for row in table["data"])
    assert cells == sorted([ln["id"], ln["prompt"], ln["expected"], ln["written"]] for ln in _lines(tmp_path))


@pytest.mark.slow
def test_mlflow_gets_the_lines_of_each_validation(fit, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)
    fit(GenerationSamples(tmp_path, rows=2), logger=MLFlowLogger("samples", tracking_uri=f"sqlite:///{tmp_path}/m.db"))
    found = {p.name: p.read_text() for p in tmp_path.rglob("samples/step_*.jsonl")}
    assert sorted(found) == ["step_10.jsonl", "step_5.jsonl"]
    lines = [json.loads(line) for name in ("step_5.jsonl", "step_10.jsonl") for line in found[name].splitlines()]
    assert lines == _lines(tmp_path)


def test_what_it_cannot_work_with_is_refused(trainer):
    with pytest.raises(ValueError, match="rows must be 1 or more, but got 0"):
        GenerationSamples(rows=0)

    with pytest.raises(TypeError, match="needs a LightningModule with a task and a tokenizer and a model"):
        trainer(GenerationSamples()).fit(BoringModel())
