"""Each kind of task from the command line: trained, evaluated, exported and asked, on tiny local models and files."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import yaml

COLOURS = ("red", "green", "blue")
TASKS = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in a folder of the test; within this process, for the imports take the most of its time."""
    from lightning_peft.cli.main import main

    monkeypatch.chdir(tmp_path)

    def go(*words):
        monkeypatch.setattr(sys, "argv", ["lightning-peft", *words])
        with warnings.catch_warnings():
            main()

    return go


def _train_and_ask(run, folder, words, rows, inputs):
    """Trains, then evaluates and predicts with the checkpoint and with the exported folder, and merges."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _ask(run, folder, words, ["data=files", "data.train_files=rows.jsonl"], rows, inputs)


def _ask(run, folder, words, data, rows, inputs):
    asked = [{column: row[column] for column in inputs} for row in rows[:5]]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    run(*words, *data, "data.batch_size=8", "trainer.max_epochs=2", "hydra.run.dir=run")
    said = {}
    for name, adapter in (("checkpoint", "run/checkpoints/best.ckpt"), ("folder", "run/adapter")):
        run("eval", f"adapter={adapter}", *data, f"hydra.run.dir={name}")
        output = f"{name}.jsonl"
        run("predict", f"adapter={adapter}", *data, "data.predict_files=asked.jsonl", f"output={output}")
        lines = [json.loads(line) for line in (folder / output).read_text().splitlines()]
        said[name] = (json.loads((folder / name / "metrics.json").read_text()), lines)
    assert said["checkpoint"] == said["folder"]
    run("export", "adapter=run/adapter", "to=merged", "format=merged")
    metrics, lines = said["folder"]
    assert [{column: line[column] for column in inputs} for line in lines] == asked
    return metrics, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "label", "monitor", "says"),
    [
        ("single_label_classification", lambda i: COLOURS[i % 3], "accuracy", {"label", "score", "probabilities"}),
        ("multi_label_classification", lambda i: list(COLOURS[: i % 3]), "f1_micro", {"labels", "probabilities"}),
        ("regression", lambda i: i / 10, "mse", {"value"}),
    ],
)
def test_text_classification_of_each_kind(run, tmp_path, bert_folder, kind, label, monitor, says):
    rows = [{"text": "red " * (1 + i % 5), "text_pair": COLOURS[i % 3], "label": label(i)} for i in range(24)]
    words = [f"model.name_or_path={bert_folder}", f"task.problem_type={kind}"]
    metrics, lines = _train_and_ask(run, tmp_path, words, rows, ["text", "text_pair"])
    assert set(lines[0]) == {"id", "text", "text_pair", *says}
    assert f"val/{monitor}" in metrics
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["monitor"], kept["mode"]) == (f"val/{monitor}", "min" if kind == "regression" else "max")
    assert f"best/val/{monitor}" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["problem_type"] == kind


@pytest.mark.slow
def test_token_classification(run, tmp_path, bert_folder):
    rows = [{"tokens": ["Ada", "saw", COLOURS[i % 3]], "tags": ["B-PER", "O", "B-COL"]} for i in range(24)]
    words = [f"model.name_or_path={bert_folder}", "task=token_classification"]
    metrics, lines = _train_and_ask(run, tmp_path, words, rows, ["tokens"])
    assert set(lines[0]) == {"id", "tokens", "tags", "scores", "entities"}
    assert {"val/f1", "val/COL/recall"} <= metrics.keys()
    assert len(lines[0]["tags"]) == 3
    labels = json.loads((tmp_path / "merged" / "config.json").read_text())["label2id"]
    assert labels == {"O": 0, "B-COL": 1, "B-PER": 2}


@pytest.mark.slow
def test_image_classification(run, tmp_path, vit_folder, draw):
    paths = sorted(str(p.relative_to(tmp_path)) for p in draw(each=8).rglob("*.png"))
    flip = "{_target_: PIL.ImageOps.mirror, _partial_: true}"
    words = [f"model.name_or_path={vit_folder}", "model=hf", "task=image_classification", f"data.transform={flip}"]
    data = ["data=images", "data.source=images"]
    metrics, lines = _ask(run, tmp_path, words, data, [{"image": path} for path in paths], ["image"])
    assert set(lines[0]) == {"id", "image", "label", "score", "probabilities"}
    assert metrics.keys() == {"val/accuracy", "val/f1_macro", "val/loss"}
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["label2id"] == {
        "blue": 0,
        "green": 1,
        "red": 2,
    }
    run("data", *words, *data, "hydra.run.dir=seen")
    assert 'src="data:image/png;base64,' in (tmp_path / "seen" / "data.html").read_text()
    run("predict", "adapter=run/adapter", *data, "data.predict_files=images/red/*.png", "output=said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["image"] for line in said] == [f"images/red/{i}.png" for i in range(8)]


def test_the_monitored_metric_is_the_tasks_unless_another_is_given_with_its_mode():
    from hydra import compose, initialize_config_module

    from lightning_peft.cli.commands import monitor_as_the_task_says

    def monitored(*words):
        with initialize_config_module("lightning_peft.conf", version_base="1.3"):
            config = compose("train", list(words))
        monitor_as_the_task_says(config)
        return config.monitor, config.mode

    assert monitored() == ("val/accuracy", "max")
    assert monitored("task.problem_type=regression") == ("val/mse", "min")
    assert monitored("task=causal_lm") == ("val/loss", "min")
    assert monitored("task=token_classification") == ("val/f1", "max")
    assert monitored("monitor=val/loss") == ("val/loss", "min")
    assert monitored("monitor=val/mcc", "mode=max") == ("val/mcc", "max")
    with pytest.raises(ValueError, match="monitor=val/mcc goes with mode=max or mode=min; the task's is val/accuracy"):
        monitored("monitor=val/mcc")
    with pytest.raises(ValueError, match="mode must be max or min, but got 'most'"):
        monitored("mode=most")


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_tasks_yaml_holds_its_options_with_their_defaults(path):
    from lightning_peft.tasks import task_from_config

    options = yaml.safe_load(path.read_text())
    task = task_from_config(path.stem)
    assert options == {"name": path.stem, **dataclasses.asdict(task)}
    assert list(options)[1:] == [f.name for f in dataclasses.fields(task)], "in the same order"
    learnt = task.to_config()
    assert options.keys() - learnt.keys() <= {"all_logits", "packing"}, "what changes no result is not kept"
    assert learnt == {name: options[name] for name in learnt}
