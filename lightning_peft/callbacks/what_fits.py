"""What makes a training step fit, counted before it is advised."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_peft.analysis.largest_batch import largest_batches
from lightning_peft.analysis.sizes import size
from lightning_peft.forecast import Step
from lightning_peft.tasks.base_source import quiet

_PRECISION = "trainer.precision="


@dataclass(frozen=True)
class _Change:
    """What is to be set, and what that makes of a step."""

    words: str
    base: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None

    def of(self, step: Step) -> Step:
        return replace(step, base=replace(step.base, **self.base), precision=self.precision or step.precision)


def what_fits(step: Step, limit: int, accumulated: int) -> str:
    """The changes of a step after which it fits, in words.

    Args:
        step: one that does not fit.
        limit: bytes that it may take.
        accumulated: batches in an optimizer step.

    Returns:
        Each change that is enough by itself, with what the step then takes; where none is, all of them together.
    """
    with quiet():  # of what it says once, this run has no use any more
        return _in_words(step, limit, accumulated)


def _in_words(step: Step, limit: int, accumulated: int) -> str:
    rows = _largest_batch(step, limit)
    batches = accumulated * -(-step.rows // max(rows, 1))
    enough = [f"data.batch_size={rows} with trainer.accumulate_grad_batches={batches}"] if rows else []
    together = step
    possible: list[str] = []
    for change in _changes(step):
        with suppress(Exception):  # what the model, or this machine, has not
            peak = change.of(step).memory().peak
            enough += [f"{change.words} ({size(peak)})"] if peak <= limit else []
            together = change.of(together)
            possible = [w for w in possible if change.precision is None or not w.startswith(_PRECISION)]
            possible.append(change.words)
    if enough:
        return f"what fits: {', or '.join(enough)}"
    with suppress(Exception):
        if rows := _largest_batch(together, limit):
            return f"what fits: {' '.join([f'data.batch_size={rows}', *possible])}, all together"
    return "not even one row fits, with all that saves memory; take a smaller model, or train less of it"


def _largest_batch(step: Step, limit: int) -> int:
    with step.imitated() as counted:
        (rows,) = largest_batches(lambda rows: counted.memory(rows, step.tokens or 1).peak, [limit], step.rows)
    return rows


def _changes(step: Step) -> list[_Change]:
    """What saves memory and is not done yet; of two precisions the one that saves more is last."""
    changes = []
    if not step.base.activation_checkpointing:
        changes.append(_Change("model.activation_checkpointing=1", {"activation_checkpointing": 1}))
    if step.base.quantization is None:
        changes.append(_Change("model.quantization=nf4", {"quantization": "nf4"}))
    saving = {"32-true": ["bf16-mixed", "bf16-true"], "bf16-mixed": ["bf16-true"], "16-mixed": ["16-true"]}
    return [*changes, *(_Change(f"{_PRECISION}{p}", precision=p) for p in saving.get(step.precision, []))]
