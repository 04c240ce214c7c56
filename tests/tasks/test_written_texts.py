"""Metrics on texts have the numbers of sacrebleu and rouge_score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.tasks.written_texts import update_written, written_metrics

REFERENCE = Path(__file__).parents[1] / "parity" / "written_texts_reference.json"
CORPORA = json.loads(REFERENCE.read_text())["corpora"]


def _scores(*parts):
    metrics = written_metrics()
    for written, expected in parts:
        update_written(metrics, written, expected)
    return {k: float(v) for k, v in metrics.compute().items()}


@pytest.mark.parametrize("name", CORPORA)
def test_scores_are_those_of_sacrebleu_and_rouge_score(name):
    corpus = CORPORA[name]
    found = _scores((corpus["written"], corpus["expected"]))
    assert {k: v for k, v in found.items() if k != "exact_match"} == pytest.approx(corpus["scores"], abs=1e-6)


def test_batches_add_up_to_the_corpus():
    corpus = CORPORA["sentences"]
    rows = list(zip(corpus["written"], corpus["expected"], strict=True))
    assert _scores(*(([a], [b]) for a, b in rows)) == pytest.approx(_scores(tuple(zip(*rows, strict=True))))


def test_an_answer_matches_exactly_but_for_white_space_at_its_ends():
    found = _scores((["red", " blue ", "Green", "a  b"], ["red", "blue", "green", "a b"]))
    assert found["exact_match"] == 0.5
