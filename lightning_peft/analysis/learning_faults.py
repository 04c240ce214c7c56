"""What may be wrong with how a run learnt, each a decision on plain numbers: movement, rate, gradients, overfitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_peft.analysis.data_summary import listed
from lightning_peft.analysis.diagnosis import Diagnosis, LossCurve, number

FAR = 10.0
"""Times a method's own rate from which a rate is far from it: rates that work lie within one power of ten."""

HARDLY = 0.02
"""Share of the usual movement below which a method hardly moved: a tenth of its own rate gives a tenth."""

STEADY = 0.1
"""Share of the whole fall that comes in the last quarter from which a loss has not flattened.

A loss on a straight line has a third there, one that learns at a linearly falling rate a sixth, one that has come down
at its own rate a twentieth.
"""

ROSE = 1.1
"""Times the first loss from which one at the end has risen: the loss of single batches varies by less, averaged."""

LEAP = 2.0
"""Times the first loss that a training which goes well never meets again: it is that of a guess."""

OVERFIT = 1.1
"""Times the least validation loss from which the last one is clearly above it: between epochs it varies by less."""

LATE = 0.75
"""Share of the validations after which the best one is no early one."""


@dataclass(frozen=True)
class Rate:
    """A learning rate beside the one that suits the method.

    Attributes:
        used: what the run was given, at the top of its schedule.
        own: the default of the method's class, for AdamW.
        method: the method's name.
        adam: whether the optimizer is of Adam's kind, so that the two can be compared.
    """

    used: float
    own: float
    method: str
    adam: bool = True

    @property
    def times(self) -> float:
        """How many times the method's own rate it is; 1 where the two cannot be compared."""
        return self.used / self.own if self.adam else 1.0

    def __str__(self) -> str:
        if not self.adam:
            return f"learning rate {number(self.used)}"
        if self.used == self.own:
            return f"learning rate {number(self.used)}, {self.method}'s own"
        return f"learning rate {number(self.used)} ({self.method}'s own is {number(self.own)})"


@dataclass(frozen=True)
class Movement:
    """How far trained tensors are from where they started.

    Attributes:
        moved: the root of the mean square of the change, over all numbers whose start is known.
        numbers: how many these are.
        steps: how many steps were made.
    """

    moved: float
    numbers: int
    steps: int

    def share(self, rate: float) -> float:
        """Of what AdamW moves numbers by whose gradients have no common direction: the rate times the root of steps.

        Args:
            rate: the method's own learning rate.
        """
        usual = rate * self.steps**0.5
        return self.moved / usual if usual else 0.0


def movement(moved: Movement | None, curve: LossCurve | None, rate: Rate) -> Diagnosis:
    """Whether the method hardly moved.

    Args:
        moved: how far; None where no start is known.
        curve: the training losses; None where there are none.
        rate: the learning rate.
    """
    subject = "movement"
    told = curve is not None and curve.tells
    if moved is None or moved.steps == 0:
        if curve is None or not told:
            return Diagnosis.unseen(subject, "neither where the adapter started nor eight training losses are known")
        evidence = str(curve)
        still = not curve.fell and curve.end < ROSE * curve.start
    else:
        evidence = (
            f"{moved.numbers:,} trained numbers moved by {number(moved.moved)} on average in {moved.steps:,} steps, "
            f"{moved.share(rate.own):.1%} of what is usual at {rate.method}'s own rate"
        )
        evidence += f"; {curve}" if told else ""
        still = moved.share(rate.own) < HARDLY and not (told and curve is not None and curve.fell)
    if not still:
        return Diagnosis(subject, evidence)
    return Diagnosis(
        subject,
        f"{evidence}; {rate}",
        "The method hardly moved: the model is still about what it was before the training.",
        f"optimizer.lr={rate.own:g}" if rate.used < rate.own else "trainer.max_epochs: train longer; see the gradients",
    )


def rate_too_high(curve: LossCurve | None, rate: Rate, broken: Sequence[str], not_finite: int) -> Diagnosis:
    """Whether the learning rate is too high: the loss rises, leaps or is no number, or far from the method's own.

    Args:
        curve: the training losses that are finite; None where there are none.
        rate: the learning rate.
        broken: names of tensors with NaN or infinite values.
        not_finite: how many losses that were logged are NaN or infinite.
    """
    subject = "rate too high"
    remedy = f"optimizer.lr={_lower(rate):g}; trainer.gradient_clip_val=1.0 against single leaps"
    if broken or not_finite:
        what = [f"NaN or infinite values in {listed(broken, 3)}"] if broken else []
        what += [f"{not_finite:,} of the logged losses are NaN or infinite"] if not_finite else []
        return Diagnosis(
            subject, f"{'; '.join(what)}; {rate}", "The training broke: its numbers are no numbers.", remedy
        )
    if curve is None or not curve.tells:
        return Diagnosis.unseen(subject, f"fewer than eight training losses are known; {rate}")
    fall, noise = curve.fall()
    late = curve.losses[len(curve.losses) // 2 :]
    leaps = sum(loss > LEAP * curve.start for loss in late)
    evidence = f"{curve}, {number(max(late))} at most in the second half; {rate}"
    if -fall > noise and curve.end > ROSE * curve.start:
        return Diagnosis(subject, evidence, "The training loss rises: the learning rate is too high.", remedy)
    if leaps > 1:
        said = f"The training loss leaps: {leaps} late ones are above {LEAP:g} times the first; the rate is too high."
        return Diagnosis(subject, evidence, said, remedy)
    if rate.times >= FAR and not curve.fell:
        said = f"The loss does not fall, and the learning rate is {rate.times:.0f} times {rate.method}'s own: too high."
        return Diagnosis(subject, evidence, said, remedy)
    if rate.times >= FAR:
        evidence += f", {rate.times:.0f} times that, which the loss shows no harm of"
    return Diagnosis(subject, evidence)


def _lower(rate: Rate) -> float:
    return rate.own if rate.adam and rate.used > rate.own else rate.used / FAR


def rate_too_low(curve: LossCurve | None, rate: Rate, moved: Movement | None) -> Diagnosis:
    """Whether the learning rate is too low for the method: far below its own, and a loss that has not come down.

    Args:
        curve: the training losses; None where there are none.
        rate: the learning rate.
        moved: how far the method moved; None where that is not known.
    """
    subject = "rate too low"
    if curve is None or not curve.tells:
        return Diagnosis.unseen(subject, f"fewer than eight training losses are known; {rate}")
    whole, late = curve.fall()[0], curve.fall(2, 3)
    share = late[0] / whole if whole > 0 else 0.0
    steady = curve.fell and share >= STEADY and late[0] > 0
    evidence = f"{rate}; {curve}"
    evidence += f", {share:.0%} of its fall in the last quarter" if curve.fell else ", no fall beyond noise"
    small = rate.times <= 1 / FAR or (moved is not None and moved.share(rate.own) < 1 / FAR and rate.used < rate.own)
    if small and (steady or (not curve.fell and curve.end < ROSE * curve.start)):
        far = f"{1 / rate.times:,.0f} times below" if rate.times <= 1 / FAR else "below"
        how = "falls steadily and has not flattened" if steady else "does not fall"
        said = f"The loss {how}, and the learning rate is {far} {rate.method}'s own: too low."
        return Diagnosis(subject, evidence, said, f"optimizer.lr={rate.own:g}")
    return Diagnosis(subject, evidence)


def gradients(trained: int, without: Sequence[str], still: Sequence[str], waiting: bool = False) -> Diagnosis:
    """Whether a part of the adapter got no gradient.

    Args:
        trained: how many tensors were to train.
        without: names of those for which the optimizer has no moments, or all zero.
        still: names of those that equal their start exactly, or are all zero, after steps that would have moved them.
        waiting: whether the method lets parts begin later.
    """
    subject = "gradients"
    names = list(dict.fromkeys([*without, *still]))
    if not trained:
        return Diagnosis.unseen(subject, "the checkpoint does not name what its optimizer trained")
    if not names:
        return Diagnosis(
            subject, f"all {trained:,} trained tensors have gradients in the optimizer's moments, and moved"
        )
    evidence = f"{len(names):,} of {trained:,} trained tensors: {listed(names, 3)}"
    evidence += f"; {len(without):,} without a gradient in the optimizer's moments" if without else ""
    evidence += f"; {len(still):,} exactly as they started" if still else ""
    if waiting:
        return Diagnosis(subject, f"{evidence}; the method lets parts begin later")
    part = "The adapter" if len(names) == trained else "A part of the adapter"
    return Diagnosis(
        subject,
        evidence,
        f"{part} got no gradient: it did not learn, as the loss does not depend on it.",
        "method.exclude_modules=[...] leaves such modules out; if they ought to learn, see whether the model calls "
        "them",
    )


def overfitting(
    validation: Sequence[tuple[float, float]], curve: LossCurve | None, best: float | None, last: float
) -> Diagnosis:
    """Whether the validation loss rises while the training loss falls.

    Args:
        validation: step and validation loss, in their order.
        curve: the training losses; None where there are none.
        best: the step of the checkpoint that was chosen as the best; None where none was chosen.
        last: the last step.
    """
    subject = "overfitting"
    if len(validation) < 3:
        return Diagnosis.unseen(subject, f"{len(validation)} validation losses are known, and three are needed")
    losses = [loss for _, loss in validation]
    place = min(range(len(losses)), key=losses.__getitem__)
    step, least, end = validation[place][0], losses[place], losses[-1]
    evidence = (
        f"validation loss {number(least)} at step {step:,.0f} of {last:,.0f} and {number(end)} at the end, "
        f"the {_ordinal(place + 1)} of {len(losses)} validations being the least"
    )
    evidence += f"; the best checkpoint is of step {best:,.0f}" if best is not None else ""
    early = place + 1 <= LATE * len(losses) and (best is None or best <= LATE * last)
    falls = curve is None or _falls_after(curve, step)
    if not (early and end > OVERFIT * least and falls):
        return Diagnosis(subject, evidence)
    evidence += f"; {curve}" if curve is not None else ""
    epochs = f"trainer.max_epochs={place + 1}" if place + 1 < len(losses) else "fewer epochs"
    return Diagnosis(
        subject,
        evidence,
        "The run overfits: the validation loss rises while the training loss falls.",
        f"callbacks=early_stopping, or {epochs}; more data, a dropout of the method, or a smaller one (method.r)",
    )


def _falls_after(curve: LossCurve, step: float) -> bool:
    before = [v for s, v in zip(curve.steps, curve.losses, strict=True) if s <= step]
    after = [v for s, v in zip(curve.steps, curve.losses, strict=True) if s > step]
    # what came just before the least validation loss, and not the first steps, is what must still fall
    return bool(before and after) and fmean(after[-max(1, len(after) // 2) :]) < fmean(
        before[-max(1, len(before) // 2) :]
    )


def _ordinal(place: int) -> str:
    return f"{place}{'th' if 10 <= place % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(place % 10, 'th')}"
