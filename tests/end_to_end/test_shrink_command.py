"""`lightning-peft shrink`: a LoRA of a smaller rank from a folder or a checkpoint, and what it costs."""

from __future__ import annotations

import json
import re

import pytest

from tests.processes import run


@pytest.fixture
def trained(tmp_path, bert_folder, monkeypatch):
    """A run with a checkpoint and an adapter, and the words for its data."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"text": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", "data.train_files=texts.jsonl", "data.batch_size=4"]
    words = [f"model.name_or_path={bert_folder}", "trainer.max_epochs=2", "method.r=4", "hydra.run.dir=run"]
    run(*words, *data, cwd=tmp_path)
    return data


def _metrics(said):
    """The table of metrics before and after."""
    rows = re.finditer(r"│ (\S+) +│ +(-?[\d.]+) │ +(-?[\d.]+) │", said)
    return {row[1]: (float(row[2]), float(row[3])) for row in rows}


@pytest.mark.slow
def test_metrics_before_and_after_are_those_of_eval(tmp_path, trained):
    said = run("shrink", "adapter=run/adapter", "r=1", "to=small", *trained, cwd=tmp_path).stdout
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    for place, adapter in enumerate(("run/adapter", "small")):
        run("eval", f"adapter={adapter}", *trained, f"hydra.run.dir=eval_{place}", cwd=tmp_path)
        found = json.loads((tmp_path / f"eval_{place}" / "metrics.json").read_text())
        told = {name: pair[place] for name, pair in _metrics(said).items()}
        assert told == pytest.approx({n: v for n, v in found.items() if v is not None}, abs=1e-4)
        assert "val/loss" in told
    assert (tmp_path / "small" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 1

    without = run("shrink", "adapter=run/checkpoints/best.ckpt", "energy=0.5", "to=half", cwd=tmp_path).stdout
    assert "data=... shows them before and after" in without
    run("eval", "adapter=half", *trained, cwd=tmp_path)
    again = run("shrink", "adapter=run/adapter", "r=1", "to=small", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "small exists and is not empty" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=nowhere", "to=small", "r=1"], "adapter=nowhere: there is no such checkpoint or folder"),
        (["adapter=empty", "to=small", "r=1"], "empty holds no adapter"),
        (["adapter=empty", "to=small"], "one of r (the new rank) and energy"),
        (["adapter=empty", "r=1"], "shrink needs to=..."),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    failed = run("shrink", *words, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
