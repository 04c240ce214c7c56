"""A run that is killed again and again ends where it would have ended, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = ("red", "green", "blue", "small", "large")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout", "adalora", "unfreezing", "workers"])
def test_a_run_killed_at_a_random_place_and_while_saving_gives_what_an_undisturbed_one_gives(
    bert_folder, tmp_path, case
):
    """Twenty seeds over the cases: parameters, optimizer, schedule, random state, record, best, all that was logged."""
    rows = [{"text": " ".join([WORDS[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).with_name("kill_and_resume.py")
    words = [bert_folder, tmp_path / "texts.jsonl", tmp_path / "runs", case, *range(5)]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [f["seed"] for f in found] == list(range(5)), done.stderr
    assert {f["seed"]: f["wrong"] for f in found} == {seed: [] for seed in range(5)}
    ends = [end for f in found for end in f["ends"]]
    assert set(ends) == {-9, 0}
    assert ends.count(-9) >= 5, "as many were killed"
