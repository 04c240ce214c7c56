"""Each decision on how a run learnt, on plain numbers."""

from __future__ import annotations

import math
import random

import pytest

from lightning_peft.analysis.diagnosis import LossCurve
from lightning_peft.analysis.learning_faults import (
    Movement,
    Rate,
    gradients,
    movement,
    overfitting,
    rate_too_high,
    rate_too_low,
)

OWN = Rate(2e-3, 2e-3, "LoRA")


def _curve(shape, count=60, noise=0.05):
    """Losses of a shape over the share of the training, with the noise of single batches."""
    draw = random.Random(0)
    return LossCurve(tuple(range(count)), tuple(shape(i / count) + draw.gauss(0, noise) for i in range(count)))


DOWN = _curve(lambda t: 2.3 * math.exp(-8 * t) + 0.2)
FLAT = _curve(lambda t: 0.7)
UP = _curve(lambda t: 0.7 + 2 * t)
STRAIGHT = _curve(lambda t: 2.3 - t)


def test_a_loss_that_comes_down_at_the_methods_own_rate_is_healthy():
    moved = Movement(0.02, 1000, 60)
    for diagnosis in (rate_too_high(DOWN, OWN, moved), rate_too_low(DOWN, OWN, moved), movement(moved, DOWN, OWN)):
        assert diagnosis.found is None
        assert diagnosis.seen


@pytest.mark.parametrize("curve", [UP, _curve(lambda t: 0.7 if t < 0.3 else 2 + math.sin(40 * t))])
def test_a_loss_that_rises_or_leaps_is_of_too_high_a_rate(curve):
    found = rate_too_high(curve, OWN)
    assert "too high" in found.found
    assert found.remedy.startswith("optimizer.lr=0.0002;"), "a tenth, as the rate is the method's own"
    assert rate_too_high(curve, Rate(0.1, 2e-3, "LoRA")).remedy.startswith("optimizer.lr=0.002;")


def test_a_few_hard_batches_are_no_leaps():
    losses = [2.0 if i in (35, 50) else loss for i, loss in enumerate(FLAT.losses)]
    assert rate_too_high(LossCurve(FLAT.steps, tuple(losses)), OWN).found is None


def test_a_far_rate_alone_is_told_but_is_no_finding_where_the_loss_came_down():
    far = Rate(0.05, 2e-3, "LoRA")
    healthy = rate_too_high(DOWN, far)
    assert healthy.found is None
    assert "25 times that, which the loss shows no harm of" in healthy.evidence
    assert "25 times LoRA's own" in rate_too_high(FLAT, far).found
    assert "only guesses" in rate_too_high(DOWN, far, guesses=True).found
    assert rate_too_high(FLAT, Rate(0.05, 2e-3, "LoRA", adam=False)).found is None, "SGD's rates are not AdamW's"


def test_what_is_not_finite_is_found_without_any_loss():
    assert "2 of the logged losses are NaN" in rate_too_high(None, OWN, not_finite=2).evidence
    assert "'lora_A'" in rate_too_high(None, OWN, broken=["lora_A"]).evidence
    assert not rate_too_high(None, OWN).seen


def test_a_low_rate_is_found_by_a_loss_that_has_not_come_down():
    low = Rate(1e-4, 2e-3, "LoRA")
    assert "20 times below LoRA's own" in rate_too_low(STRAIGHT, low, None).found
    assert "falls steadily and has not flattened" in rate_too_low(STRAIGHT, low, None).found
    assert "does not fall" in rate_too_low(FLAT, low, None).found
    assert rate_too_low(DOWN, low, None).found is None, "it was enough"
    assert rate_too_low(STRAIGHT, OWN, None).found is None, "more steps, no other rate"
    assert not rate_too_low(None, low, None).seen


def test_hardly_moving_is_a_matter_of_the_methods_own_rate_and_of_the_steps():
    still, usual = Movement(1e-6, 1000, 100), Movement(0.02, 1000, 100)
    assert "hardly moved" in movement(still, None, OWN).found
    assert "hardly moved" in movement(still, DOWN, Rate(1e-7, 2e-3, "LoRA")).found
    assert movement(still, DOWN, Rate(0.1, 2e-3, "LoRA", adam=False)).found is None, "its steps are another's"
    assert movement(usual, None, OWN).found is None
    assert "Nothing was learnt" in movement(usual, FLAT, OWN).found
    assert "Nothing was learnt" in movement(None, FLAT, OWN).found
    assert not movement(None, None, OWN).seen


def test_what_had_no_gradient_is_named():
    found = gradients(4, ["a.lora_A", "a.lora_B"], [])
    assert "A part of the adapter" in found.found
    assert "2 of 4 trained tensors: 'a.lora_A', 'a.lora_B'" in found.evidence
    assert gradients(2, [], ["a", "b"]).found.startswith("The adapter got no gradient")
    assert gradients(4, [], []).found is None
    assert gradients(4, ["a"], [], waiting=True).found is None, "layers that a schedule has not reached"
    assert not gradients(0, [], []).seen


def test_overfitting_takes_both_curves_and_an_early_best():
    rising = [(float(10 * i), 0.5 + abs(i - 2) / 10) for i in range(1, 7)]
    assert "overfits" in overfitting(rising, DOWN, 20.0, 60.0).found
    assert "0.5 at step 20 of 60 and 0.9 at the end" in overfitting(rising, DOWN, 20.0, 60.0).evidence
    assert overfitting(rising, DOWN, 60.0, 60.0).found is None, "the metric that counts was best at the end"
    assert overfitting(rising, UP, 20.0, 60.0).found is None, "nothing is learnt by heart there"
    assert overfitting([(s, 0.5) for s, _ in rising], DOWN, 20.0, 60.0).found is None
    assert not overfitting(rising[:2], DOWN, None, 60.0).seen
