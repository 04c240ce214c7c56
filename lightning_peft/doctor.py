"""What is wrong with a run, read from its folder: files, checkpoints, the exported adapter, and the base."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_peft.analysis import data_faults, learning_faults, run_faults
from lightning_peft.analysis.diagnosis import Diagnosis, LossCurve
from lightning_peft.analysis.learning_faults import Rate
from lightning_peft.analysis.run_files import RunFiles, read_config, why_failed
from lightning_peft.core.method import Method, Scheduled
from lightning_peft.data.module import LENGTH_OF_ROWS
from lightning_peft.methods.config import method_from_config, method_to_config
from lightning_peft.saved_run import Base, SavedRun


@dataclass(frozen=True)
class Examination:
    """A run that was looked at.

    Attributes:
        folder: the run's.
        about: which method on which base, in a few words.
        diagnoses: of each thing that was looked at, or could not be.
        lacking: a sentence for each file that is missing or cannot be read.
    """

    folder: Path
    about: str
    diagnoses: tuple[Diagnosis, ...]
    lacking: tuple[str, ...]

    @property
    def findings(self) -> list[Diagnosis]:
        """What is wrong."""
        return [d for d in self.diagnoses if d.found is not None]


def examine(folder: str | Path, *, check_base: bool = True) -> Examination:
    """Looks at a run's folder; nothing in it is changed, and nothing is fetched.

    Args:
        folder: the run's, with what ``lightning-peft train`` writes.
        check_base: compare the base that ``config.yaml`` names, where it is on this machine, with the checkpoint's, and
            the adapter with its start on that base. Its weights are read for that.

    Returns:
        What was found, and what was looked at.

    Raises:
        FileNotFoundError: if it is no run's folder.
    """
    run = RunFiles.read(Path(folder))
    saved = SavedRun.read(run.folder)
    method = _method(run, saved)
    base = saved.base(run.option("model")) if check_base else Base(why="check_base=false leaves the base unread")
    guessing = data_faults.no_better_than_guessing(
        _reached(run, saved), run.labels, run.option("monitor"), _scored(run)
    )
    guesses = guessing.found is not None
    diagnoses = [
        _unended(run, saved),
        *(_learning(run, saved, base, method, guesses=guesses) if method is not None else ()),
        _overfitting(run, saved),
        data_faults.truncation(run.cuts, run.option("data", "max_length") or LENGTH_OF_ROWS),
        guessing,
        run_faults.another_base(saved.fingerprints, base.mismatch, base.why, compared=base.compared),
        run_faults.unreadable(saved.damaged, best=bool(saved.best)),
        *_forgetting(run),
    ]
    name = run.option("model", "name_or_path") or saved.record.get("base", {}).get("name")
    about = f"{type(method).__name__ if method is not None else 'an unknown method'} on {name or 'an unknown base'}"
    return Examination(run.folder, about, tuple(diagnoses), (*run.lacking, *saved.lacking))


def _method(run: RunFiles, saved: SavedRun) -> Method | None:
    given = saved.method or run.option("method")
    try:
        return method_from_config(given) if isinstance(given, dict) else None
    except (ValueError, TypeError) as error:
        run.lacking.append(f"what is said of the method cannot be read: {error}")
        return None


def _unended(run: RunFiles, saved: SavedRun) -> Diagnosis:
    steps = [step for step, _ in run.logged("train/loss")]
    step = saved.step if saved.step is not None else int(max(steps)) + 1 if steps else None
    each = saved.epoch_steps
    return run_faults.unended(
        metrics=run.metrics is not None,
        epoch=step // each if step is not None and each else None,
        epochs=_limit(run.option("trainer", "max_epochs")),
        step=step,
        steps=_limit(run.option("trainer", "max_steps")),
        failed=why_failed(run.folder),
    )


def _limit(given: Any) -> int | None:
    return given if isinstance(given, int) and given > 0 else None


def _learning(run: RunFiles, saved: SavedRun, base: Base, method: Method, *, guesses: bool) -> Iterable[Diagnosis]:
    rate, curve = _rate(run, saved, method), _curve(run, saved)
    moved = saved.movement(base)
    without, still = saved.without_gradient(base, adam=rate.adam)
    waiting = isinstance(method, Scheduled) and method.scheduled
    yield learning_faults.rate_too_high(
        curve, rate, moved, broken=saved.not_finite, not_finite=run.not_finite if run.broke else 0, guesses=guesses
    )
    yield learning_faults.rate_too_low(curve, rate, moved)
    yield learning_faults.gradients(len(saved.trained), without, still, waiting)
    yield learning_faults.movement(moved, curve, rate)


def _rate(run: RunFiles, saved: SavedRun, method: Method) -> Rate:
    optimizer = saved.optimizer or run.option("optimizer") or {}
    given = optimizer.get("lr")
    used = float(given) if isinstance(given, int | float) else method.learning_rate
    adam = "adam" in str(optimizer.get("name", "AdamW")).lower()
    return Rate(used, *_own_rate(method), adam)


def _own_rate(method: Method) -> tuple[float, str]:
    """The rate that suits a method, and whose it is.

    That is the class's; what a class makes of its options may be several methods, such as BitFit and full fine-tuning,
    whose presets say it then: the one that agrees in most options.
    """
    own = method_to_config(method)
    presets = (
        (p.stem, read_config(p)) for p in sorted(Path(str(files("lightning_peft.conf") / "method")).glob("*.yaml"))
    )
    alike = [(name, said) for name, said in presets if said["_target_"] == own["_target_"]]
    rates = {name: _rate_of(said) for name, said in alike}
    if len(set(rates.values())) < 2:
        return next(iter(rates.values()), method.learning_rate), type(method).__name__
    name, _ = max(alike, key=lambda pair: sum(own.get(k, v) == v for k, v in pair[1].items()))
    bears = name.replace("_", "") == type(method).__name__.lower()
    return rates[name], type(method).__name__ if bears else name


def _rate_of(preset: dict[str, Any]) -> float:
    rate = preset["learning_rate"]
    # in YAML 1.1 a number like 2e-3 is a word
    return method_from_config(preset).learning_rate if rate is None else float(rate)


def _curve(run: RunFiles, saved: SavedRun) -> LossCurve | None:
    """The losses of all steps, which a checkpoint has; the log has some of them."""
    points = saved.losses or run.logged("train/loss")
    return LossCurve(*zip(*points, strict=True)) if points else None


def _overfitting(run: RunFiles, saved: SavedRun) -> Diagnosis:
    points = saved.evaluated("val/loss") or run.logged("val/loss")
    curve = _curve(run, saved)
    last = max([*(s for s, _ in points), *(curve.steps if curve else ())], default=0)
    return learning_faults.overfitting(points, curve, saved.best_step, last)


def _reached(run: RunFiles, saved: SavedRun) -> dict[str, float]:
    """The values that the best checkpoint has, by the names of the validation's metrics."""
    metrics = {n: v for n, v in (run.metrics or saved.reached).items() if isinstance(v, int | float)}
    best = {n.removeprefix("best/"): v for n, v in metrics.items() if n.startswith("best/")}
    return {n: float(v) for n, v in {**metrics, **best}.items() if math.isfinite(v)}


def _scored(run: RunFiles) -> int | None:
    """How many rows a validation looked at, where ``trainer.limit_val_batches`` leaves some out."""
    limit = run.option("trainer", "limit_val_batches")
    rows = run.option("data", "eval_batch_size") or run.option("data", "batch_size")
    if type(limit) is float and limit < 1:
        return int(limit * sum((run.labels or {}).values())) or None
    return limit * rows or None if type(limit) is int and isinstance(rows, int) else None


def _forgetting(run: RunFiles) -> Iterable[Diagnosis]:
    if run.forgetting is not None:
        before = run.forgetting.get("before")
        known = float(before) if isinstance(before, int | float) else None
        forgotten = run.forgetting["forgetting"]
        if forgotten is None:
            yield Diagnosis.unseen("forgetting", "the loss on held-out text was not finite")
        else:
            yield run_faults.forgetting(run.forgetting["kind"], known, float(forgotten))
