"""What a search was after and what came of it, read from a study that Optuna wrote."""

from __future__ import annotations

import re
from pathlib import Path

import optuna
import pytest

from lightning_peft.analysis.comparison import compared
from lightning_peft.analysis.comparison_report import search_note, write_report
from lightning_peft.analysis.runs import Run
from lightning_peft.analysis.study import OBJECTIVES, STUDY, directions, read_search, storage, value_of

RANGES = {
    "method.r": optuna.distributions.CategoricalDistribution([4, 8, 16]),
    "optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
    "method.lora_dropout": optuna.distributions.FloatDistribution(0.0, 0.3),
}


def searched(folder, trials, objectives=("val/accuracy",), where=("maximize",)):
    """A study in which the learning rate alone decides; one trial is pruned and one failed."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(study_name=STUDY, storage=storage(folder), directions=list(where), sampler=sampler)
    study.set_user_attr(OBJECTIVES, list(objectives))
    for number in range(trials):
        trial = study.ask(RANGES)
        values = [1 - 10 * trial.params["optimizer.lr"], float(trial.params["method.r"])][: len(where)]
        if number == 1 and len(where) == 1:
            trial.report(0.1, 1)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif number == 2:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, values)
    study.ask(RANGES)
    return study


def test_a_search_is_read_as_optuna_has_it(tmp_path):
    study = searched(tmp_path, 20)
    found = read_search(tmp_path)
    assert found.objectives == ("val/accuracy",)
    assert found.larger == (True,)
    assert [t.state for t in found.trials[:4]] == ["complete", "pruned", "failed", "complete"]
    assert found.trials[-1].state == "running"
    assert found.trials[1].values == (0.1,)
    assert [t.options for t in found.trials] == [t.params for t in study.get_trials()]
    assert set(found.options) == set(RANGES)
    assert found.on_a_log_scale == {"optimizer.lr"}
    assert max(found.importances, key=found.importances.get) == "optimizer.lr", "which alone decides"
    assert sum(found.importances.values()) == pytest.approx(1.0)


def test_few_trials_tell_nothing_of_importance(tmp_path):
    searched(tmp_path, 8)
    assert read_search(tmp_path).importances == {}


def test_a_folder_without_a_study_has_no_search(tmp_path):
    assert read_search(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("several", [False, True])
def test_the_page_of_a_search_draws_it_and_finds_each_trial_by_its_setting(tmp_path, several):
    two = {"objectives": ("val/accuracy", "trained"), "where": ("maximize", "minimize")} if several else {}
    searched(tmp_path, 20, **two)
    search = read_search(tmp_path)
    runs = [
        Run(search.folder / str(t.number), "lora", 0, t.options, "val/accuracy", "max", t.values[0], {}, 1000)
        for t in search.judged
    ]
    comparison = compared(runs)
    page = write_report(comparison, {}, tmp_path / "report", search)
    assert {"search_history.png", "search_options.svg", "search_importances.png"} <= {
        path.name for path in page.parent.iterdir()
    }
    text = page.read_text()
    objectives = len(search.objectives)
    for place, setting in enumerate(comparison.settings):
        marks = len(re.findall(rf'<g class="method-{place}"><title>', text))
        assert marks >= objectives * (1 + len(RANGES)) + 1, "history, options, and the metric against parameters"
        assert f"r={setting.runs[0].settings['method.r']}" in setting.name
    assert search_note(search) in text


def test_what_was_pruned_is_told(tmp_path):
    searched(tmp_path, 5)
    assert search_note(read_search(tmp_path)) == (
        "A search of 6 trials by val/accuracy: 3 complete, 1 pruned, 1 failed, 1 running. Pruned trials had fewer "
        "steps, so they might have come further: 1."
    )


def test_costs_are_to_be_small_and_the_metric_as_the_task_says():
    objectives = ["val/accuracy", "trained", "val/loss"]
    assert directions(objectives, "val/accuracy", "max") == ["maximize", "minimize", "minimize"]
    assert directions(["val/loss"], "val/loss", "min") == ["minimize"]


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (["val/accuracy", "trainable"], "but got trainable; did you mean 'trained'"),
        (["trained", "trained"], r"each once, .* but got \[trained, trained\]"),
        ([], r"but got \[\]"),
    ],
)
def test_what_is_no_objective_is_refused(objectives, said):
    with pytest.raises(ValueError, match=said):
        directions(objectives, "val/accuracy", "max")


def test_a_run_is_judged_by_its_best_metric_and_its_costs():
    metrics = {"val/accuracy": 0.8, "val/loss": 0.5}
    run = Run(Path("3"), "lora", 0, {}, "val/accuracy", "max", 0.9, metrics, 1000, step_seconds=0.2)
    assert [value_of(run, name) for name in ("val/accuracy", "val/loss", "trained", "step_seconds")] == [
        *(0.9, 0.5, 1000.0, 0.2)
    ]
    with pytest.raises(ValueError, match="3: the objective peak_bytes was not taken in this run"):
        value_of(run, "peak_bytes")
