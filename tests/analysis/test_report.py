"""What the plan looks like at several widths."""

from __future__ import annotations

import re
import sys

import pytest

from lightning_peft import LoRA, adapt
from lightning_peft.analysis.report import print_plan


@pytest.fixture
def plan(build):
    return adapt(build("bert"), LoRA(r=2)).plan


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_names_stay_whole_and_lines_fit_at_every_width(plan, monkeypatch, capsys, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    print_plan(plan)
    said = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    for row in plan.rows:
        assert row.place in said
    assert max(map(len, said.splitlines())) <= columns
    assert ("parameters  " in said) == (columns >= 80), "a table, where it fits"


def test_small_sizes_are_read_in_small_units(plan, capsys):
    print_plan(plan)
    assert f"{plan.trainable_bytes / 1000:.1f} kB)" in capsys.readouterr().out
