"""`lightning-peft -m +sweep=optuna...`: a study of real runs, pruned, gone on with, and compared."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from optuna.trial import TrialState

from lightning_peft.analysis.study import load
from tests.processes import run

RATE = "optimizer.lr=choice(0.005,1e-9)"


@pytest.fixture(scope="module")
def words(tmp_path_factory, bert_folder):
    """Overrides for runs of a second."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"sentence": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = [f"data.{split}_files={folder}/texts.jsonl" for split in ("train", "validation")]  # which is soon learnt
    data = ["data=files", *files, "data.columns.text=sentence", "data.batch_size=4"]
    return [f"model.name_or_path={bert_folder}", *data, "trainer.max_epochs=3", "monitor=val/loss"]


def lora(words):
    # a rank of 64 is too much for the tiny model, and every trial but the first is compared
    search = ["method.r=choice(4,64)", "search.pruner_options.n_startup_trials=1", "hydra.sweep.dir=found"]
    return ["-m", "+sweep=optuna_lora", RATE, *search, *words]


@pytest.fixture(scope="module")
def searched(tmp_path_factory, words):
    """A search of four trials of which some fail and some are hopeless."""
    folder = tmp_path_factory.mktemp("searched")
    return folder, run(*lora(words), "search.trials=4", "search.seed=10", cwd=folder, check=False)


@pytest.mark.slow
def test_a_hopeless_trial_ends_early_and_a_failed_one_is_told(searched):
    folder, done = searched
    trials = load(folder / "found").get_trials()
    by_state = {state: [t for t in trials if t.state == state] for state in TrialState}
    assert len(trials) == 4
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        assert by_state[state], f"the seed draws a trial that ends as {state.name}"
    assert done.returncode == 2
    assert f"{len(by_state[TrialState.FAIL])} of 4 runs failed" in done.stderr
    assert "a rank of 64 is above 32" in done.stderr
    for trial in by_state[TrialState.COMPLETE] + by_state[TrialState.PRUNED]:
        run_dir = folder / "found" / str(trial.number)
        metrics = json.loads((run_dir / "metrics.json").read_text())
        steps = json.loads((run_dir / "cost.json").read_text())["steps"]
        epochs, whole = len(trial.intermediate_values), trial.state == TrialState.COMPLETE
        assert steps == 10 * epochs, "40 rows in batches of 4"
        assert (epochs == 3) == whole, "the hopeless one has fewer epochs"
        assert trial.value == pytest.approx(metrics["best/val/loss"] if whole else trial.intermediate_values[epochs])
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert config["method"]["r"] == trial.params["method.r"]
        assert config["optimizer"]["lr"] == trial.params["optimizer.lr"]
        assert (run_dir / "adapter").is_dir()
    best = load(folder / "found").best_trial
    assert f"trial {best.number}: val/loss" in done.stdout


@pytest.mark.slow
def test_the_same_words_go_on_with_the_study_and_other_words_are_refused(searched, words):
    folder, _ = searched
    before = load(folder / "found").get_trials()
    judged = [t for t in before if t.values]
    run(*lora(words), f"search.trials={len(judged)}", cwd=folder)
    assert load(folder / "found").get_trials() == before, "nothing is missing"
    run(*lora(words), f"search.trials={len(judged) + 1}", cwd=folder)
    after = load(folder / "found").get_trials()
    assert after[:4] == before
    assert (folder / "found" / "4").is_dir()
    other = run(*lora(words), "data.batch_size=2", cwd=folder, check=False)
    assert other.returncode == 2
    assert "holds a study with other words: they were" in other.stderr
    assert "Traceback" not in other.stderr
    assert len(load(folder / "found").get_trials()) == len(after)


@pytest.mark.slow
def test_a_search_is_compared_with_its_drawings(searched):
    folder, _ = searched
    said = run("compare", "folders=found", "hydra.run.dir=report", cwd=folder).stdout
    assert "A search of" in said
    assert {"search_history.png", "search_options.png"} <= {path.name for path in (folder / "report").iterdir()}
    trials = {str(t.number): t for t in load(folder / "found").get_trials()}
    with (folder / "report" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    judged = {number for number, trial in trials.items() if trial.values}
    assert {row["folder"].rpartition("/")[2] for row in rows} == judged
    for row in rows:
        trial = trials[row["folder"].rpartition("/")[2]]
        assert f"optimizer.lr={trial.params['optimizer.lr']:g}" in row["setting"]


@pytest.mark.slow
def test_several_objectives_are_weighed(tmp_path, words):
    ranks = ["search.objectives=[val/loss,trained]", "method.r=choice(2,8)", "search.trials=2", "trainer.max_epochs=1"]
    done = run("-m", "+sweep=optuna", *words, *ranks, cwd=tmp_path)
    study = load(tmp_path / "multirun" / "optuna")
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    for trial in study.get_trials():
        metrics = json.loads((tmp_path / "multirun" / "optuna" / str(trial.number) / "metrics.json").read_text())
        assert trial.values == [pytest.approx(metrics["best/val/loss"]), metrics["trainable_parameters"]]
    assert "no other is better in all than" in done.stdout
    assert all(f"trial {t.number}: val/loss" in done.stdout for t in study.best_trials)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["search.trials=1"], "nothing is searched; write choice(4,8,16)"),
        ([RATE, "search.sampler=TPE"], "optuna.samplers has no 'TPE'; did you mean 'TPESampler'"),
        ([RATE, "search.pruner=Median"], "optuna.pruners has no 'Median'; did you mean 'MedianPruner'"),
        ([RATE, "search.objectives=[val/accuracy,params]"], "search.objectives takes, each once, val/accuracy"),
        ([RATE, "search.parallel=0"], "search.parallel must be a whole number from 1 on, but got 0"),
        ([RATE, "search.trails=3"], "there is no 'search.trails'; did you mean 'trials'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, given, said):
    failed = run("-m", "+sweep=optuna", *given, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
