"""What is noted of a training: small, in plain values, and exact about which weights it speaks of."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_peft.formats.training_record import TrainingRecord


def _record(steps):
    record = TrainingRecord(step=steps)
    for step in range(1, steps + 1):
        record.add_loss(step, torch.tensor(float(step)))
    record.settle()
    return record


def test_a_short_run_keeps_every_step():
    assert _record(300).losses == [[s, s, 1] for s in range(1, 301)]


@pytest.mark.parametrize("steps", [1000, 12_345])
def test_a_long_run_keeps_means_over_equal_stretches(steps):
    record = _record(steps)
    assert 150 < len(record.losses) <= 400
    width = record.losses[0][0]
    for end, mean, batches in record.losses[:-1]:
        assert (end % width, batches) == (0, width)
        assert mean == pytest.approx(end - (width - 1) / 2)
    assert sum(batches for _, _, batches in record.losses) == steps
    assert record.losses[-1][0] == steps


def test_it_comes_back_from_json_as_it_was():
    record = _record(5)
    record.add_metrics(5, {"val/loss": 0.5, "val/auroc": float("nan")})
    record.setup = [["optimizer", "AdamW"], ["a", "b"]]
    again = TrainingRecord.from_dict(
        {**json.loads(json.dumps(record.to_dict(), sort_keys=True)), "of a later version": 1}
    )
    assert again == record
    assert again.reached == {"val/loss": 0.5}


ODD = {
    "rows": ({"data": {"splits": {"train": {"rows": "many"}}}}, "data.splits.train.rows holds something else"),
    "splits": ({"data": {"splits": ["train"]}}, "data.splits holds something else"),
    "split": ({"data": {"splits": {"train": 3}}}, "data.splits holds something else"),
    "origin": ({"data": {"origin": 5}}, "data.origin holds something else"),
    "labels": ({"data": {"splits": {"train": {"labels": {"a": "x"}}}}}, "data.splits.train.labels holds something"),
    "spreads": (
        {"data": {"splits": {"train": {"spreads": {"a": {"median": None, "largest": 2}}}}}},
        "data.splits.train.spreads must hold a median",
    ),
    "unit": (
        {"data": {"splits": {"train": {"spreads": {"a": {"median": 1, "largest": 2, "unit": []}}}}}},
        "data.splits.train.spreads must hold a median",
    ),
    "step": ({"step": 10**4200}, "numbers must be below 9,223,372,036,854,775,808"),
    "count": ({"data": {"splits": {"train": {"rows": 10**300}}}}, "numbers must be below"),
    "before": ({"step": -4}, "step and earlier must be 0 or more"),
    "nothing": ({"losses": [[1, 0.5, 0]]}, "a number above 0"),
    "backwards": ({"metrics": {"val/loss": [[-5, 1.0]]}}, "metrics must hold a step"),
}


@pytest.mark.parametrize(("values", "said"), ODD.values(), ids=ODD)
def test_notes_that_no_training_makes_are_refused_when_they_are_read(values, said):
    """A model card is made of them, and none could be: the adapter that they came with would never be saved again."""
    with pytest.raises(ValueError, match=said):
        TrainingRecord.from_dict(values)


def test_the_metrics_are_those_of_the_weights_and_not_the_last():
    record = _record(4)
    for step, loss in ((2, 0.2), (4, 0.4)):
        record.add_metrics(step, {"val/loss": loss})
    earlier = record.at(2)
    assert (earlier.reached, earlier.last_step) == ({"val/loss": 0.2}, 4)
    assert record.at(1).reached == {}
    record.up_to(2)
    assert (record.last_step, record.metrics, len(record.losses)) == (2, {"val/loss": [[2, 0.2]]}, 2)
