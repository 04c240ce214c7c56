"""Printed commands can be pasted."""

from __future__ import annotations

import importlib.util
import shlex
import sys

import pytest

from lightning_peft.analysis.called import program


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "env" / "bin" / "lightning-peft"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_program_that_the_shell_would_not_find_is_printed_as_it_was_called(script, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "argv", ["env/bin/lightning-peft", "seed=1"])
    assert program() == "env/bin/lightning-peft"


def test_a_program_on_the_path_is_printed_by_its_name(script, monkeypatch):
    monkeypatch.setenv("PATH", str(script.parent))
    for called in (str(script), "env/bin/lightning-peft"):
        monkeypatch.setattr(sys, "argv", [called])
        assert program() == "lightning-peft"


def test_another_program_of_the_same_name_on_the_path_is_not_meant(script, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lightning-peft").symlink_to(script)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    monkeypatch.setattr(sys, "argv", ["env/bin/lightning-peft"])
    assert program() == "env/bin/lightning-peft"


def test_a_script_is_run_by_its_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["my train.py", "seed=1"])
    assert shlex.split(program()) == [sys.executable, "my train.py"]


@pytest.mark.parametrize("is_main", [True, False])
def test_a_module_is_run_by_its_name_unless_another_one_runs_it(monkeypatch, is_main):
    module = importlib.util.find_spec("lightning_peft.cli.main" if is_main else "pytest")
    path = importlib.util.find_spec("lightning_peft.cli.main").origin
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module)
    monkeypatch.setattr(sys, "argv", [path])
    assert shlex.split(program())[1:] == (["-m", "lightning_peft.cli.main"] if is_main else [path])
