"""Adapters and checkpoints with something changed in them load, or are refused in a sentence that names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutated_files.py")


@pytest.mark.parametrize(
    "cases", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["some", "many"]
)
def test_a_changed_file_loads_or_is_refused_and_does_nothing_else(cases):
    """In a process of its own, with little memory, some seconds a case and hooks on what it opens and runs."""
    words = [sys.executable, str(SCRIPT), "--cases", str(cases), "--seed", str(cases)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"it ended at case {done.stderr.strip().splitlines()[-1:]}"
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert found["beside"] == []
    # changes are small enough that some still load, and large enough that most do not
    assert found["loaded"] > cases / 20
    assert found["refused"] > cases / 2
    assert found["loaded"] + found["refused"] == cases
