"""`lightning-peft doctor`: what is wrong with a run, by its folder alone."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tests.conftest import SIZES
from tests.processes import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    """A healthy run in ``a run`` and one of too low a rate in ``slow``, and where they lie."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    place = tmp_path_factory.mktemp("runs")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.3)).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    draw = random.Random(0)
    with (place / "texts.jsonl").open("w") as file:
        for i in range(160):
            words = [draw.choice(["sun", "moon", "tree", "house"]), str(i), *[["red", "blue"][i % 2]] * 4]
            file.write(json.dumps({"text": " ".join(words), "label": i % 2}) + "\n")
    words = [
        "model.name_or_path=base",
        "data=files",
        "data.train_files=texts.jsonl",
        "data.batch_size=8",
        "trainer=cpu",
    ]
    run(*words, "hydra.run.dir='a run'", "trainer.max_epochs=5", cwd=place)
    run(*words, "hydra.run.dir=slow", "trainer.max_epochs=2", "optimizer.lr=1e-7", cwd=place)
    return place


@pytest.mark.slow
def test_a_healthy_run_is_said_to_be_one_and_nothing_is_written(folder):
    before = sorted(folder.rglob("*"))
    done = run("doctor", "a run", cwd=folder)
    assert done.stdout.startswith("a run: LoRA on base\n\nNothing found. Looked at:\n")
    for subject in ("end", "gradients", "overfitting", "truncation", "guessing", "base"):
        assert f"\n  {subject} " in done.stdout
    assert "Not looked at" not in done.stdout
    assert "\x1b" not in done.stdout, "not a terminal"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_what_is_found_is_told_with_what_to_write_and_by_the_exit_code(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["slow"], ["run=slow"], ["slow", "check_base=false"]):
        done = run("doctor", *words, cwd=folder, check=False)
        assert done.returncode == 1, done.stderr
        assert "20,000 times below LoRA's own: too low." in done.stdout
        assert "to do  optimizer.lr=0.002\n" in done.stdout
        assert not done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "doctor needs run=..."),
        (["nowhere"], "nowhere is no folder"),
        (["."], ". is no run's folder"),
        (["a", "b"], "doctor: one run is expected, but got 'a' and 'b'"),
        (["-m", "run=a,b"], "leave -m out"),
        (["a", "check_base=maybe"], "check_base must be true or false"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, words, said):
    failed = run("doctor", *words, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_runs_below_a_folder_are_named(tmp_path):
    (tmp_path / "outputs" / "today" / "one").mkdir(parents=True)
    (tmp_path / "outputs" / "today" / "one" / "config.yaml").write_text("seed: 0\n")
    failed = run("doctor", "outputs", cwd=tmp_path, check=False)
    assert "runs below it: outputs/today/one" in failed.stderr
