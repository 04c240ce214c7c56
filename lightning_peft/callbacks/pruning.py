"""A trial of a search tells its study how it does, and ends where the study's pruner has seen enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.analysis.study import PRUNED, load, made_of

if TYPE_CHECKING:
    import optuna


class Pruning(Callback):
    """Ends the training of a trial that does badly, after a validation.

    What is compared is the metric after as many validations in other trials, so the trials of a study should validate
    equally often. The run ends as one that was stopped early: its best checkpoint is kept and exported. A trial at
    its last step is complete whatever the pruner says.

    Args:
        folder: of the sweep, where the study lies.
        trial: the run's number in the study.
        monitor: the metric that is reported, by which the study must be judged.
        pruner: a class of ``optuna.pruners``; None reports, and never ends a training.
        options: the pruner's.
    """

    def __init__(
        self,
        folder: str | Path,
        trial: int,
        monitor: str,
        pruner: str | None = "MedianPruner",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.number = trial
        self.monitor = monitor
        self.pruner = pruner
        self.options = dict(options or {})
        self._trial: optuna.Trial | None = None
        self._validations = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trial, self._validations = self._own_trial() if trainer.is_global_zero else None, 0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        value = trainer.callback_metrics.get(self.monitor)
        prunes = value is not None and self._is_pruned(float(value))
        ends = trainer.global_step >= trainer.estimated_stepping_batches
        if trainer.strategy.broadcast(prunes) and not ends:
            trainer.should_stop = True
            if self._trial is not None:
                self._trial.set_user_attr(PRUNED, self._validations)
                print(f"pruned: {self.monitor} is {float(value or 0.0):.4g} after validation {self._validations}")

    def _is_pruned(self, value: float) -> bool:
        if self._trial is None:
            return False
        self._trial.report(value, self._validations)
        return self._trial.should_prune()

    def _own_trial(self) -> optuna.Trial | None:
        """The trial as its sweeper made it; None where Optuna prunes none, as it compares one objective only."""
        import optuna

        pruner = optuna.pruners.NopPruner()
        if self.pruner is not None:
            pruner = made_of(optuna.pruners, self.pruner, self.options)
        study = load(self.folder, pruner=pruner)
        if len(study.directions) > 1:
            return None
        found = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        if self.number not in found or found[self.number].state.is_finished():
            raise ValueError(f"{self.folder} has no trial {self.number} that is running; a sweep gives search.trial")
        return optuna.trial.Trial(study, found[self.number]._trial_id)
