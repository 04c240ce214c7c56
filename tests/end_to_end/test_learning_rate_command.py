"""``optimizer.lr=auto`` from the command line, in processes of their own."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.processes import run

ROWS = [{"text": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(24)]


@pytest.fixture
def words(tmp_path, bert_folder):
    """Overrides for a run of seconds."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ["data=files", "data.train_files=texts.jsonl", "data.batch_size=4"]
    return [f"model.name_or_path={bert_folder}", *data, "method.r=2", "trainer.max_epochs=2"]


@pytest.mark.slow
def test_a_rate_is_found_written_down_and_gives_the_run_that_it_gives_written_out(tmp_path, words):
    said = run(*words, "optimizer.lr=auto", "hydra.run.dir=found", cwd=tmp_path)
    found = json.loads((tmp_path / "found" / "lr_find.json").read_text())
    rate = found["lr"]
    assert f"learning rate {rate:g}, found in {len(found['rates'])} steps; LoRA's own is 0.002" in said.stdout
    assert "Finding best initial lr" not in said.stderr, "bars are for terminals"
    assert (tmp_path / "found" / "lr_find.png").stat().st_size > 1000
    assert yaml.safe_load((tmp_path / "found" / "config.yaml").read_text())["optimizer"]["lr"] == rate
    assert f"| learning rate | {rate:g} |" in (tmp_path / "found" / "adapter" / "README.md").read_text()

    run(*words, f"optimizer.lr={rate}", "hydra.run.dir=written", cwd=tmp_path)
    assert not (tmp_path / "written" / "lr_find.json").exists()
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("found", "written"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in other)
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("found", "written"))
    assert first.keys() == second.keys()
    judged = [key for key in second if "val/" in key]
    assert len(judged) > 2
    assert [first[key] for key in judged] == [second[key] for key in judged]

    longer = [*words[:-1], "trainer.max_epochs=3", "optimizer.lr=auto", "ckpt_path=found/checkpoints/last.ckpt"]
    again = run(*longer, "hydra.run.dir=resumed", cwd=tmp_path)
    assert "found in" not in again.stdout
    assert not (tmp_path / "resumed" / "lr_find.json").exists()
    assert yaml.safe_load((tmp_path / "resumed" / "config.yaml").read_text())["optimizer"]["lr"] == rate


@pytest.mark.slow
def test_a_search_that_finds_nothing_says_what_to_write(tmp_path, words):
    rare = ["trainer.accumulate_grad_batches=50", "optimizer.lr=auto", "hydra.run.dir=run"]  # of 5 batches in an epoch
    refused = run(*words, *rare, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "optimizer.lr=auto found no rate" in refused.stderr
    assert "write the method's own, optimizer.lr=0.002" in refused.stderr
    assert json.loads((tmp_path / "run" / "lr_find.json").read_text())["lr"] is None
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optimizer"]["lr"] == "auto"
