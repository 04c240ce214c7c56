"""The plain files of a run's folder, whole, cut short or of another kind."""

from __future__ import annotations

import math

import pytest

from lightning_peft.analysis.run_files import RunFiles, read_log


def _log(folder, name, *rows):
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / name).write_text("step,train/loss,val/loss\n" + "".join(f"{row}\n" for row in rows))


def test_the_log_of_a_run_that_went_on_is_one(tmp_path):
    _log(tmp_path, "metrics.1.csv", "0,3.0,", "1,2.0,", "2,9.0,")
    _log(tmp_path, "metrics.csv", "2,1.0,", "3,,0.5", "4,0.")
    rows = read_log(tmp_path / "logs" / "metrics.csv")
    assert [(row["step"], row.get("train/loss")) for row in rows] == [(0, 3), (1, 2), (2, 1), (3, None), (4, 0)]


def test_losses_that_are_no_numbers_are_counted_and_left_out_of_the_curve(tmp_path):
    _log(tmp_path, "metrics.csv", "0,3.0,", "1,nan,", "2,inf,", "3,,nan")
    run = RunFiles.read(tmp_path)
    assert run.not_finite == 3
    assert run.logged("train/loss") == [(0.0, 3.0)]
    assert math.isnan(run.log[1]["train/loss"])


def test_what_cannot_be_read_is_told_by_its_name(tmp_path):
    (tmp_path / "config.yaml").write_text("- a list\n")
    (tmp_path / "metrics.json").write_text('{"val/accu')
    (tmp_path / "data.json").write_text('{"splits": {"train": {"labels": [1], "tokens": null}}}')
    (tmp_path / "forgetting.json").write_text('{"kind": "loss"}')
    run = RunFiles.read(tmp_path)
    for name in (
        "config.yaml must hold a mapping",
        "metrics.json is no JSON",
        "forgetting.json has no",
    ):
        assert any(name in said for said in run.lacking), name
    assert "logs/metrics.csv is not there" in run.lacking
    assert (run.labels, run.cuts, run.option("trainer", "max_epochs")) == (None, {}, None)


def test_yaml_that_would_make_objects_is_not_opened(tmp_path):
    (tmp_path / "config.yaml").write_text("run: !!python/object/apply:os.system ['true']\n")
    assert "is no YAML" in RunFiles.read(tmp_path).lacking[0]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run's folder: it has no config\.yaml"):
        RunFiles.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        RunFiles.read(tmp_path / "nowhere")
