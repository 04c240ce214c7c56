"""Each decision on what a run learnt from and on its files, on plain numbers."""

from __future__ import annotations

import pytest

from lightning_peft.analysis.data_faults import no_better_than_guessing, truncation
from lightning_peft.analysis.data_summary import Cut
from lightning_peft.analysis.run_faults import another_base, forgetting, unended, unreadable

LABELS = {"a": 60, "b": 40}


def test_a_cut_is_a_fault_where_it_takes_what_is_learnt():
    eaten = Cut(looked_at=10, rows=9, tokens=400, tokens_lost=200, supervised=100, supervised_lost=60, enough=52)
    found = truncation({"train": eaten}, 16)
    assert found.found is not None
    assert "90.0% of the rows are cut, 60.0% of what is learnt is lost" in found.evidence
    assert found.remedy.startswith("data.max_length=52 loses next to nothing")
    own = truncation({"train": eaten}, 512)
    assert own.remedy.startswith("a larger limit of the task's own"), "data.max_length cuts nothing"
    assert truncation({"train": Cut(10, 9, 400, 200, 0, 0, 0)}, 16).found is None, "labels of whole rows"
    assert truncation({"train": Cut(10, 1, 400, 4, 100, 4, 30)}, 16).found is None
    assert not truncation({}, 16).seen


@pytest.mark.parametrize(
    ("metrics", "guesses"),
    [
        ({"val/accuracy": 0.6}, True),
        ({"val/accuracy": 0.64}, True),  # within the 5% by which another hundred rows would differ
        ({"val/accuracy": 0.7}, False),
        ({"val/mcc": 0.02}, True),
        ({"val/mcc": 0.4}, False),
        ({"val/f1_macro": 0.375}, True),  # 2 * 0.6 / 1.6 of one class, 0 of the other
        ({"val/f1_macro": 0.5}, False),
    ],
)
def test_a_metric_is_compared_with_what_one_label_alone_gives(metrics, guesses):
    assert (no_better_than_guessing(metrics, LABELS, None).found is not None) is guesses


def test_a_metric_of_few_rows_differs_by_chance_by_more():
    metrics = {"val/accuracy": 0.7}
    assert no_better_than_guessing(metrics, LABELS, None, scored=50).found is None
    few = no_better_than_guessing(metrics, LABELS, None, scored=16)
    assert few.found is not None, "16 rows differ by 12%"
    assert "val/accuracy 0.7 on 16 rows, and" in few.evidence


def test_the_metric_that_chose_the_checkpoint_decides():
    metrics = {"val/accuracy": 0.6, "val/mcc": 0.3}
    assert no_better_than_guessing(metrics, LABELS, "val/mcc").found is None
    assert "val/accuracy 0.6, and always saying 'a' (60.0% of 100 rows) gives 0.6" in (
        no_better_than_guessing(metrics, LABELS, "val/accuracy").evidence
    )


@pytest.mark.parametrize(
    ("metrics", "labels"),
    [({"val/accuracy": 1.0}, None), ({"val/loss": 1.0}, LABELS), ({"val/accuracy": 1.0}, {"a": 5})],
)
def test_without_a_guess_to_compare_with_it_is_said(metrics, labels):
    assert not no_better_than_guessing(metrics, labels, None).seen


def test_a_run_ends_with_its_metrics():
    assert unended(metrics=True, epoch=1, epochs=4, step=10, steps=None).found is None, "it may have stopped early"
    assert unended(metrics=False, epoch=1, epochs=4, step=10, steps=None).found == "The run did not end."
    assert "stopped before it wrote" in unended(metrics=False, epoch=4, epochs=4, step=40, steps=None).found
    assert "no step is known" in unended(metrics=False, epoch=None, epochs=4, step=None, steps=None).evidence
    failed = unended(metrics=False, epoch=None, epochs=4, step=None, steps=None, failed="token_indices is empty")
    assert failed.found == "The run failed: token_indices is empty"


def test_bases_are_told_apart_by_their_fingerprints():
    same = {"last.ckpt": "aa", "adapter": "aa"}
    assert another_base(same, None, "it is the same").found is None
    assert "different bases" in another_base({**same, "adapter": "bb"}, None, "").found
    assert "config.yaml names" in another_base(same, "values differ", "").found
    assert not another_base({"last.ckpt": None}, None, "").seen
    assert not another_base(same, None, "it has no weights", compared=False).seen
    assert another_base({**same, "adapter": "bb"}, None, "", compared=False).found is not None


def test_what_was_saved_and_cannot_be_read_is_a_fault():
    assert unreadable([], best=True).found is None
    found = unreadable(["last.ckpt (10 bytes) is cut short"], best=True)
    assert found.evidence == "last.ckpt (10 bytes) is cut short"
    assert "best.ckpt" in found.remedy
    assert "best.ckpt" not in unreadable(["best.ckpt (10 bytes) is cut short"], best=False).remedy


def test_forgetting_counts_against_what_the_base_knew():
    assert forgetting("loss", 3.0, 0.9).found is not None
    assert forgetting("loss", 3.0, 0.2).found is None
    assert forgetting("cka", None, 0.3).found is not None
    assert forgetting("cka", 1.0, 0.05).found is None
