"""`lightning-peft diff`: two adapters beside each other, from their files."""

from __future__ import annotations

import json

import pytest

from lightning_peft import LoRA, adapt
from tests.processes import run


@pytest.fixture
def folders(tmp_path, build, perturb, monkeypatch):
    """Two adapters of one base, of ranks 4 and 2."""
    monkeypatch.setenv("COLUMNS", "80")
    for name, r in (("first", 4), ("second", 2)):
        model = build("bert")
        adapter = adapt(model, LoRA(r=r, lora_alpha=8))
        perturb(adapter)
        adapter.save(tmp_path / name)


def test_what_differs_is_told_and_written(tmp_path, folders):
    said = run("diff", "a=first", "b=second", "to=numbers", cwd=tmp_path).stdout
    assert "r: 4 in a, 2 in b" in said
    assert "\nbase" not in said, "which is the same"
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    found = json.loads((tmp_path / "numbers" / "diff.json").read_text())
    assert (found["a"], found["options"]) == ("first", {"r": [4, 2]})
    assert all(0 < c["relative"] < 1.5 and len(c["columns"]["angles"]) == 2 for c in found["changes"].values())
    again = run("diff", "a=first", "b=second", "to=numbers", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "diff.json exists" in again.stderr


def test_the_same_adapter_is_told_to_be_the_same(tmp_path, folders):
    said = run("diff", "a=first", "b=first", cwd=tmp_path).stdout
    assert "Method, options, base and the names of the tensors are the same" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=first", "b=nowhere"], "nowhere: there is no such checkpoint or folder"),
        (["a=first"], "diff needs b=..."),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, folders, words, said):
    failed = run("diff", *words, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
