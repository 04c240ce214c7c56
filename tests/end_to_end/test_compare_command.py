"""`lightning-peft -m +sweep=methods` and `lightning-peft compare`: every method over seeds, and what came of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from tests.processes import run

SWEEP = ("-m", "+sweep=methods")


@pytest.fixture(scope="module")
def words(tmp_path_factory, bert_folder):
    """Overrides for runs of a second."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"sentence": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(24)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", f"data.train_files={folder}/texts.jsonl", "data.columns.text=sentence", "data.batch_size=4"]
    return [f"model.name_or_path={bert_folder}", *data, "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, words):
    """A sweep of which one method fails in each run."""
    folder = tmp_path_factory.mktemp("swept")
    chosen = ["method=lora,bitfit,llama_adapter", "seed=1,2"]
    return folder, run(*SWEEP, *chosen, *words, cwd=folder, check=False)


@pytest.mark.slow
def test_a_run_that_failed_is_reported_and_the_others_are_made(swept):
    folder, done = swept
    assert done.returncode == 2
    assert "2 of 6 runs failed" in done.stderr
    for method in ("lora", "bitfit"):
        for seed in ("1", "2"):
            cost = json.loads((folder / "multirun" / "methods" / method / seed / "cost.json").read_text())
            assert cost["step_seconds"] > 0
            assert cost["peak_bytes"] is None, "no GPU"


@pytest.mark.slow
def test_the_same_words_make_what_is_missing_and_nothing_twice(swept, words):
    folder, _ = swept
    place = folder / "multirun" / "methods" / "lora"
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*.ckpt")}
    done = run(*SWEEP, "method=lora", "seed=1,2,3", *words, cwd=folder)
    assert done.stdout.count("finished before: multirun/methods/lora/") == 2
    assert (place / "3" / "metrics.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = done.stdout[done.stdout.rindex("chosen") :]
    assert table.count("seed=") == 3, "those that were finished before are in the table too"
    other = run(*SWEEP, "method=lora", "seed=1", *words, "data.batch_size=2", cwd=folder, check=False)
    assert other.returncode == 2
    assert "holds a run with other settings (data.batch_size was 4, now 2); name another folder" in other.stderr


@pytest.mark.slow
def test_a_sweep_is_compared_in_the_terminal_and_on_a_page(swept):
    folder, _ = swept
    said = run("compare", "multirun/methods", "hydra.run.dir=report", cwd=folder).stdout
    for expected in (
        "setting",
        "val/accuracy",
        "lora",
        "bitfit",
        "Take ",
        "Left out: ",
        "report/compare.html",
    ):
        assert expected in said
    with (folder / "report" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        metrics = json.loads((Path(row["folder"]) / "metrics.json").read_text())
        assert float(row["best val/accuracy"]) == metrics["best/val/accuracy"]
        assert int(row["checkpoint_bytes"]) == (Path(row["folder"]) / "checkpoints" / "best.ckpt").stat().st_size
    assert {row["setting"] for row in rows} == {"lora", "bitfit"}
    assert "learning_curves.svg" in {path.name for path in (folder / "report").iterdir()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("folders=.", "holds no run"),
        ("config.yaml", "config.yaml is a file; a folder of runs is expected"),
        ("seed=1", "there is no 'seed'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, given, said):
    (tmp_path / "config.yaml").write_text("")
    failed = run("compare", given, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


def test_runs_that_did_not_end_are_no_comparison(tmp_path):
    (tmp_path / "cut").mkdir()
    config = {"method": {"_target_": "lightning_peft.LoRA"}, "optimizer": {}, "trainer": {}}
    (tmp_path / "cut" / "config.yaml").write_text(yaml.safe_dump(config))
    failed = run("compare", "cut", cwd=tmp_path, check=False)
    assert "none of the 1 runs in cut can be compared: cut: did not end" in failed.stderr


@pytest.mark.slow
def test_why_a_training_failed_is_told_when_its_terminal_is_gone(tmp_path):
    words = ["method=trainable_tokens", "hydra.run.dir=failed", "trainer.max_steps=1", "data.limit=8"]
    assert run(*words, cwd=tmp_path, check=False).returncode == 2
    assert (tmp_path / "failed" / "error.txt").read_text().startswith("token_indices is empty")
    compared = run("compare", "failed", cwd=tmp_path, check=False)
    assert "failed: token_indices is empty" in compared.stderr
    examined = run("doctor", "failed", cwd=tmp_path, check=False)
    assert "The run failed: token_indices is empty" in examined.stdout
    run(*words, "method.token_indices=[1996]", cwd=tmp_path)
    assert not (tmp_path / "failed" / "error.txt").exists(), "it has ended since"


def test_another_command_leaves_no_reason_of_its_failure(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert run("doctor", "nowhere", cwd=tmp_path, check=False).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_every_method_that_needs_nothing_more_is_in_the_sweep():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        params = compose("train", ["+sweep=methods"], return_hydra_config=True).hydra.sweeper.params
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (word,) = parser.parse_overrides([f"method={params.method}"])
        chosen = set(word.sweep_string_iterator())
    there = {path.stem for path in (Path(__file__).parents[2] / "conf" / "method").glob("*.yaml")}
    assert there - chosen == {"hf_peft", "llama_adapter", "trainable_tokens"}
