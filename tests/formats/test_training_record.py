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


def test_the_metrics_are_those_of_the_weights_and_not_the_last():
    record = _record(4)
    for step, loss in ((2, 0.2), (4, 0.4)):
        record.add_metrics(step, {"val/loss": loss})
    earlier = record.at(2)
    assert (earlier.reached, earlier.last_step) == ({"val/loss": 0.2}, 4)
    assert record.at(1).reached == {}
    record.up_to(2)
    assert (record.last_step, record.metrics, len(record.losses)) == (2, {"val/loss": [[2, 0.2]]}, 2)
