"""Trials of a real study on a small LightningModule: the hopeless one ends early, and the study knows it."""

from __future__ import annotations

import lightning as L
import optuna
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.analysis.study import PRUNED, STUDY, load, storage
from lightning_peft.callbacks.pruning import Pruning

EPOCHS = 4


class Guess(L.LightningModule):
    """Its metric is a number of its own, the same after each validation."""

    def __init__(self, metric: float) -> None:
        super().__init__()
        self.metric, self.layer = metric, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", self.metric)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(folder, metric, study, *, epochs=EPOCHS, **options):
    """A trial from a study's asking to its telling; returns the trainer after it."""
    trial = study.ask()
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), 2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pruning = Pruning(folder, trial.number, "val/accuracy", **options)
    plain = {"enable_checkpointing": False, "accelerator": "cpu", **quiet}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[pruning], **plain)
    trainer.fit(Guess(metric), loader, loader)
    pruned = PRUNED in study.get_trials()[trial.number].user_attrs
    study.tell(trial, *([] if pruned else [metric]), **({"state": optuna.trial.TrialState.PRUNED} if pruned else {}))
    return trainer


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(study_name=STUDY, storage=storage(tmp_path), direction="maximize")


MEDIAN = {"pruner": "MedianPruner", "options": {"n_startup_trials": 1}}


def test_a_trial_below_the_median_ends_early_and_is_pruned_at_its_value(tmp_path, study):
    assert trained(tmp_path, 0.9, study, **MEDIAN).current_epoch == EPOCHS
    assert trained(tmp_path, 0.2, study, **MEDIAN).current_epoch == 1
    assert trained(tmp_path, 0.95, study, **MEDIAN).current_epoch == EPOCHS
    first, hopeless, last = study.get_trials()
    assert hopeless.state == optuna.trial.TrialState.PRUNED
    assert hopeless.intermediate_values == {1: pytest.approx(0.2)}
    assert hopeless.value == pytest.approx(0.2)
    assert [list(trial.intermediate_values) for trial in (first, last)] == [[1, 2, 3, 4]] * 2


def test_a_trial_at_its_last_step_is_complete(tmp_path, study):
    trained(tmp_path, 0.9, study, epochs=1, **MEDIAN)
    trained(tmp_path, 0.2, study, epochs=1, **MEDIAN)
    assert {trial.state for trial in study.get_trials()} == {optuna.trial.TrialState.COMPLETE}


def test_without_a_pruner_every_trial_is_trained_to_its_end_and_reported(tmp_path, study):
    trained(tmp_path, 0.9, study, pruner=None)
    assert trained(tmp_path, 0.2, study, pruner=None).current_epoch == EPOCHS
    assert study.get_trials()[1].intermediate_values == dict.fromkeys((1, 2, 3, 4), pytest.approx(0.2))


def test_no_trial_of_several_objectives_is_pruned(tmp_path):
    study = optuna.create_study(study_name=STUDY, storage=storage(tmp_path), directions=["maximize", "minimize"])
    pruning = Pruning(tmp_path, study.ask().number, "val/accuracy", "ThresholdPruner", {"lower": 1.0})
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), 2)
    trainer = L.Trainer(max_epochs=2, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Guess(0.2), loader, loader)
    assert trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("trial", "options", "said"),
    [
        (0, {"pruner": "MedianPruning"}, "no 'MedianPruning'; did you mean 'MedianPruner'"),
        (0, {"pruner": "MedianPruner", "options": {"startup": 1}}, r"optuna.pruners.MedianPruner: .*'startup'"),
        (3, MEDIAN, "has no trial 3 that is running"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, study, trial, options, said):
    study.ask()
    pruning = Pruning(tmp_path, trial, "val/accuracy", **options)
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), 2)
    trainer = L.Trainer(max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=said):
        trainer.fit(Guess(0.2), loader, loader)
    assert trainer.global_step == 0


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no study\.journal: no search by \+sweep=optuna was made there"):
        load(tmp_path)
