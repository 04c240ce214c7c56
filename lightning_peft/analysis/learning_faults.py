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

LEAP = 2.0
"""Times the first loss, about that of a guess, that single batches of a training which goes well hardly ever meet."""

LEAPS = 0.2
"""Share of the losses in the second half that leap from which it is no single batch that is hard."""

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
    """Whether the method hardly moved, or moved to no effect.

    Args:
        moved: how far; None where no start is known.
        curve: the training losses; None where there are none.
        rate: the learning rate.
    """
    subject = "movement"
    curve = curve if curve is not None and curve.tells else None
    seen, stands = list[str](), False
    if moved is not None and moved.steps:
        share = moved.share(rate.own)
        seen.append(
            f"{moved.numbers:,} trained numbers moved by {number(moved.moved)} in {moved.steps:,} steps, "
            f"{_times(share)} what is usual at {rate.method}'s own rate"
        )
        stands = share < HARDLY
    if curve is None and not seen:
        return Diagnosis.unseen(subject, "neither where the adapter started nor eight training losses are known")
    if curve is not None and (curve.fell or curve.rose or not seen):
        seen.append(f"the training loss {'fell' if curve.fell else 'rose' if curve.rose else 'did not fall'}")
    fell_or_rose = curve is not None and (curve.fell or curve.rose or curve.end > LEAP * curve.start)
    # a loss that seems to fall proves nothing where the numbers stand, unless another optimizer's steps are that small
    stands = stands and (rate.adam or not fell_or_rose)
    if not stands and (curve is None or fell_or_rose):
        return Diagnosis(subject, "; ".join(seen))
    evidence = "; ".join([*seen, *([str(curve)] if curve else []), str(rate)])
    remedy = f"optimizer.lr={rate.own:g}" if rate.times < 1 else "more epochs (trainer.max_epochs), or another rate"
    if stands:
        said = "The method hardly moved: the model is still about what it was before the training."
        return Diagnosis(subject, evidence, said, remedy)
    said = "Nothing was learnt: the training loss did not fall by more than its noise."
    return Diagnosis(subject, evidence, said, f"{remedy}; a larger method.r, or the labels: lightning-peft data")


def rate_too_high(
    curve: LossCurve | None,
    rate: Rate,
    moved: Movement | None = None,
    *,
    broken: Sequence[str] = (),
    not_finite: int = 0,
    guesses: bool = False,
) -> Diagnosis:
    """Whether the learning rate is too high: the loss rises, leaps or is no number, or far from the method's own.

    Args:
        curve: the training losses that are finite; None where there are none.
        rate: the learning rate.
        moved: how far the method moved; None where that is not known.
        broken: names of tensors with NaN or infinite values.
        not_finite: how many losses that were logged are NaN or infinite.
        guesses: whether the model came to be no better than a guess.
    """
    subject = "rate too high"
    remedy = f"optimizer.lr={_lower(rate):g}; trainer.gradient_clip_val=1.0 against single leaps"
    if broken or not_finite:
        odd = [f"NaN or infinite values in {listed(broken, 3)}"] if broken else []
        odd += [f"{not_finite:,} of the logged losses are NaN or infinite"] if not_finite else []
        return Diagnosis(
            subject, f"{'; '.join(odd)}; {rate}", "The training broke: its numbers are no numbers.", remedy
        )
    if curve is None or not curve.tells:
        return Diagnosis.unseen(subject, f"fewer than eight training losses are known; {rate}")
    late = curve.losses[len(curve.losses) // 2 :]
    # of the first losses the largest: one batch that happens to be easy is no measure
    leaps = 0 if curve.fell else sum(loss > LEAP * max(curve.quarter(0)) for loss in late)
    evidence = f"{curve}, {number(max(late))} at most in the second half; {rate}"
    if rate.adam and moved is not None and moved.share(rate.own) < HARDLY:
        return Diagnosis(subject, f"the method hardly moved; {rate}")
    if curve.rose:
        return Diagnosis(subject, evidence, "The training loss rises: the learning rate is too high.", remedy)
    if leaps >= LEAPS * len(late):
        said = f"The training loss leaps: {leaps} late ones are above {LEAP:g} times the first; the rate is too high."
        return Diagnosis(subject, evidence, said, remedy)
    if rate.times >= FAR and (guesses or not curve.fell):
        what = "The model only guesses" if curve.fell else "The loss does not fall"
        said = f"{what}, and the learning rate is {rate.times:,.0f} times {rate.method}'s own: too high."
        return Diagnosis(subject, evidence, said, remedy)
    if rate.times >= FAR:
        evidence += f", {rate.times:,.0f} times that, which the loss shows no harm of"
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
    whole, late = curve.fall()[0], curve.fall(2, 3)[0]
    share = late / whole if whole > 0 else 0.0
    steady = curve.fell and share >= STEADY
    evidence = f"{rate}; "
    last = f"{share:.0%} of its fall in" if share > 0 else "it rose in"
    evidence += f"the loss fell, {last} the last quarter" if curve.fell else "no fall of the loss"
    share_moved = 1.0 if moved is None else moved.share(rate.own)
    small = rate.times <= 1 / FAR or (share_moved < 1 / FAR and rate.times < 1)
    stands = rate.adam and share_moved < HARDLY
    if small and (steady or stands or not (curve.fell or curve.rose)):
        far = f"{1 / rate.times:,.0f} times below" if rate.times <= 1 / FAR else "below"
        how = "falls steadily and has not flattened" if steady else "does not fall"
        said = f"The loss {how}, and the learning rate is {far} {rate.method}'s own: too low."
        return Diagnosis(subject, f"{evidence}; {curve}", said, f"optimizer.lr={rate.own:g}")
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
        return Diagnosis(subject, f"all {trained:,} trained tensors had gradients, as the optimizer's moments tell")
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
        return Diagnosis.unseen(subject, f"of three validation losses that are needed {len(validation)} are known")
    losses = [loss for _, loss in validation]
    place = min(range(len(losses)), key=losses.__getitem__)
    step, least, end = validation[place][0], losses[place], losses[-1]
    evidence = (
        f"validation loss {number(least)} at step {step:,.0f} of {last:,.0f} and {number(end)} at the end, "
        f"the {_ordinal(place + 1)} of {len(losses)} validations being the least"
    )
    evidence += f"; the best checkpoint is of step {best:,.0f}" if best is not None else ""
    early = place + 1 <= LATE * len(losses) and (best is None or best <= LATE * last)
    # what is learnt by heart has a lower loss than anything that was not seen
    by_heart = curve is None or (_falls_after(curve, step) and curve.end < least)
    if not (early and end > OVERFIT * least and by_heart):
        return Diagnosis(subject, evidence)
    evidence += f"; {curve}" if curve is not None else ""
    return Diagnosis(
        subject,
        evidence,
        "The run overfits: the validation loss rises while the training loss falls.",
        f"callbacks=early_stopping or trainer.max_steps={step:.0f}; more data, a dropout, a smaller method.r",
    )


def _falls_after(curve: LossCurve, step: float) -> bool:
    before = [v for s, v in zip(curve.steps, curve.losses, strict=True) if s <= step]
    after = [v for s, v in zip(curve.steps, curve.losses, strict=True) if s > step]
    # what came just before the least validation loss, and not the first steps, is what must still fall
    return bool(before and after) and fmean(after[-max(1, len(after) // 2) :]) < fmean(
        before[-max(1, len(before) // 2) :]
    )


def _times(share: float) -> str:
    return f"{share:,.0f} times" if share >= 10 else f"{share:.2g} times"


def _ordinal(place: int) -> str:
    return f"{place}{'th' if 10 <= place % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(place % 10, 'th')}"
