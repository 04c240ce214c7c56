"""What the plan looks like at several widths."""

from __future__ import annotations

import re
import sys

import pytest
from torch import nn

from lightning_peft import LoRA, PromptTuning, Selective, adapt
from lightning_peft.analysis.plan import plan_of, plan_within
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


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            LoRA(r=2, layers_to_transform=[1]),
            "from model.layers.1 on; no backward pass goes through the layer",
        ),
        (Selective(parameter_types=["norm"], layers_to_transform=[1]), "from model.layers.1 on"),
        (LoRA(r=2), None),
        (Selective(parameter_types=["norm"]), None),
        (PromptTuning(num_virtual_tokens=2), None),
    ],
)
def test_the_plan_says_before_which_layers_the_backward_pass_ends(build, method, said, capsys):
    model = build("llama")
    adapter = adapt(model, method)
    print_plan(adapter.plan)
    printed = capsys.readouterr().out
    assert (said in printed) if said else ("Trains from" not in printed)


def test_what_a_checkpoint_takes_counts_what_trains_beside_the_adapter(build):
    model = nn.ModuleDict({"base": build("bert"), "head": nn.Linear(10, 3)})
    adapt(model["base"], LoRA(r=2))
    plan = plan_within(model, "base", "default")
    alone = plan_of(model["base"], "default")
    assert plan.checkpoint_bytes == alone.checkpoint_bytes + 3 * 33 * 4
    assert f"a checkpoint, with AdamW's state, {plan.checkpoint_bytes / 1000:.1f} kB" in str(plan)


def test_small_sizes_are_read_in_small_units(plan, capsys):
    print_plan(plan)
    assert f"{plan.trainable_bytes / 1000:.1f} kB)" in capsys.readouterr().out
