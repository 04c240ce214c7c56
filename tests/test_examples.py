"""Each example runs as a user would run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("callback_on_a_convnet.py", [], "with the adapter disabled the backbone is the base again"),
        ("docstrings_with_peft_module.py", ["--epochs", "1", "--limit", "64"], "from the exported folder"),
        ("fabric.py", [], "of the base's parameters, loaded from adapter/"),
        ("lightning_cli.py", ["fit", "--config", EXAMPLES / "lightning_cli.yaml"], "backbone.*  LoRA, 2 x, 2,048"),
        ("sequence_to_sequence.py", ["--epochs", "1"], "exact_match"),
        ("preference_pairs.py", ["--epochs", "1", "--limit", "32"], "held-out accuracy"),
        ("signatures_find_docstrings.py", ["--limit", "32", "--held-out", "32"], "load_adapter"),
        ("reload_and_generate.py", ["--limit", "32"], "def close"),
        ("tag_signatures.py", ["--epochs", "1", "--limit", "48"], "F1 of entities"),
        ("sort_images.py", ["--epochs", "1", "--images", "8"], "held-out accuracy"),
        ("chat.py", ["--epochs", "1"], "chat_template.jinja"),
    ],
)
def test_the_example_runs(script, words, said, tmp_path):
    assert said in run_script(EXAMPLES / script, *words, cwd=tmp_path).stdout


def test_every_example_is_run_by_a_test():
    marks = test_the_example_runs.pytestmark
    run = {row[0] for mark in marks if mark.name == "parametrize" for row in mark.args[1]}
    assert run == {p.name for p in EXAMPLES.glob("*.py")}
