"""Every task has a YAML that says what its dataclass says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_peft.tasks import task_from_config

FOLDER = Path(__file__).parents[2] / "conf" / "task"


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.yaml"))])
def test_a_tasks_yaml_holds_its_options_with_their_defaults_and_what_it_monitors(name):
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    options = config["task"]
    assert options.pop("name") == name
    task = task_from_config({"name": name})
    assert list(options) == [f.name for f in fields(task)]
    assert options == {f.name: getattr(task, f.name) for f in fields(task)}
    assert (config["monitor"], config["mode"]) == (task.monitor, task.mode)
    assert task_from_config(task.to_config()) == task
