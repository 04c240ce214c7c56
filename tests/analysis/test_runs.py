"""What a finished run left, as numbers."""

from __future__ import annotations

import json

import pytest
import yaml

from lightning_peft.analysis.runs import find_runs, read_run

CONFIG = {
    "method": {"_target_": "lightning_peft.LoRA", "r": 8},
    "optimizer": {"name": "AdamW", "lr": None},
    "trainer": {"max_epochs": 2, "default_root_dir": "/somewhere"},
    "data": {"seed": 3, "batch_size": 8},
    "callbacks": {"cost": {"folder": "/somewhere"}},
    "seed": 3,
    "monitor": "val/accuracy",
    "mode": "max",
    "run_dir": "/somewhere",
}
METRICS = {"val/accuracy": 0.7, "val/loss": None, "best/val/accuracy": 0.8, "trainable_parameters": 120}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        kind, text = ("yaml", yaml.safe_dump(content)) if name == "config" else ("json", json.dumps(content))
        (folder / f"{name}.{kind}").write_text(text)
    return folder


def test_a_run_is_read_from_what_stands_in_its_folder(tmp_path):
    layers = {"layer.0": 0.1, "layer.1": 0.3}
    folder = write(
        tmp_path,
        config=CONFIG,
        metrics=METRICS,
        cost={"schema": 1, "step_seconds": 0.25, "steps": 8, "peak_bytes": None},
        forecast={"schema": 1, "peak": 5000},
        forgetting={"schema": 1, "forgetting": 0.2, "layers": layers},
    )
    run = read_run(folder)
    assert (run.method, run.seed, run.score, run.trained) == ("LoRA", 3, 0.8, 120)
    assert (run.step_seconds, run.peak_bytes, run.peak_measured) == (0.25, 5000, False)
    assert (run.forgetting, run.layers) == (0.2, layers)
    assert run.checkpoint_bytes is None
    assert run.settings == {
        "method._target_": "lightning_peft.LoRA",
        "method.r": 8,
        "optimizer.name": "AdamW",
        "optimizer.lr": None,
        "trainer.max_epochs": 2,
        "data.seed": 3,
        "data.batch_size": 8,
        "monitor": "val/accuracy",
        "mode": "max",
    }, "neither places nor the seed"


def test_what_a_gpu_measured_stands_before_what_was_counted(tmp_path):
    cost = {"step_seconds": 0.25, "peak_bytes": 7000}
    run = read_run(write(tmp_path, config=CONFIG, metrics=METRICS, cost=cost, forecast={"peak": 5000}))
    assert (run.peak_bytes, run.peak_measured) == (7000, True)


def test_what_watches_a_run_is_no_setting_and_what_stops_it_is(tmp_path):
    callbacks = {
        "cost": {"every": 1},
        "early_stopping": {"patience": 3},
        "checkpoint": {"dirpath": "/x", "mode": "max"},
    }
    run = read_run(write(tmp_path, config={**CONFIG, "callbacks": callbacks}, metrics=METRICS))
    told = {name: value for name, value in run.settings.items() if name.startswith("callbacks.")}
    assert told == {"callbacks.early_stopping.patience": 3, "callbacks.checkpoint.mode": "max"}


def test_a_rate_that_was_searched_for_is_one_setting_and_a_search_for_another_is_none(tmp_path):
    config = {**CONFIG, "optimizer": {"lr": 0.01}}
    write(tmp_path, config=config, metrics=METRICS, lr_find={"schema": 1, "lr": 0.01})
    assert read_run(tmp_path).settings["optimizer.lr"] == "auto"
    write(tmp_path, lr_find={"schema": 1, "lr": None})
    assert read_run(tmp_path).settings["optimizer.lr"] == 0.01


def test_another_programs_configuration_is_passed_over(tmp_path):
    ended = write(tmp_path / "run", config=CONFIG, metrics=METRICS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("- a list")
    assert find_runs([tmp_path]) == ([ended], [])


def test_the_presets_name_is_hydras(tmp_path):
    write(tmp_path, config=CONFIG, metrics=METRICS)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {method: dora}}}")
    assert read_run(tmp_path).method == "dora"


def test_runs_are_found_below_a_folder_each_once(tmp_path):
    ended = write(tmp_path / "sweep" / "0", config=CONFIG, metrics=METRICS)
    cut = write(tmp_path / "sweep" / "1", config=CONFIG)
    write(tmp_path / "sweep" / "evaluated", config={"adapter": "x", "trainer": {}}, metrics={"val/accuracy": 0.5})
    assert find_runs([tmp_path, tmp_path / "sweep"]) == ([ended], [cut])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.json", "{", "is no JSON"),
        ("metrics.json", "[1]", "must hold a JSON object, but holds a list"),
        ("metrics.json", '{"trainable_parameters": 3}', "has no finite best/val/accuracy: nothing validated"),
        ("config.yaml", "a: [", "is no YAML"),
        ("config.yaml", "a: &a [1]\nb: *a", "has references"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, said):
    write(tmp_path, config=CONFIG, metrics=METRICS)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_run(tmp_path)
