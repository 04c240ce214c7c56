"""Runs side by side: groups, fronts, chance and the recommended one, against figures worked out by other means."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_peft.analysis.comparison import compared, pareto
from lightning_peft.analysis.comparison_report import PAGE, write_report
from lightning_peft.analysis.comparison_table import columns, fronts, notes
from lightning_peft.analysis.runs import Run
from lightning_peft.analysis.settings import numbers


def run(method, seed, score, *, settings=None, **more):
    given = {"monitor": "val/accuracy", "mode": "max", "metrics": {"val/accuracy": score}, "trained": 1000, **more}
    return Run(Path(f"runs/{method}/{seed}"), method, seed, settings or {"data.batch_size": 8}, score=score, **given)


def several(method, scores, **more):
    return [run(method, seed, score, **more) for seed, score in enumerate(scores)]


LORA, IA3, FULL = (0.90, 0.91, 0.92), (0.88, 0.885, 0.882), (0.905, 0.915, 0.91)


def test_runs_that_differ_in_their_seed_alone_are_one_setting_with_the_better_first():
    found = compared([*several("ia3", IA3), *several("lora", LORA)])
    assert [s.name for s in found.settings] == ["lora", "ia3"]
    assert found.settings[0].score == pytest.approx(0.91)
    assert found.settings[0].spread == pytest.approx(0.01), "the standard deviation of a sample"


def test_less_is_better_where_the_metric_is_a_loss():
    found = compared(several("lora", (1.2, 1.3), mode="min") + several("ia3", (2.0, 2.1), mode="min"))
    assert [s.name for s in found.settings] == ["lora", "ia3"]
    assert found.recommended == "lora"


def test_a_setting_is_named_by_the_options_in_which_it_differs():
    def lora(rank, size):
        return {"method.r": rank, "method.lora_alpha": 16, "data.batch_size": size}

    runs = [run("lora", 0, 0.9, settings=lora(4, 8)), run("lora", 0, 0.8, settings=lora(8, 8))]
    other = run("ia3", 0, 0.7, settings={"method.learning_rate": 0.02, "data.batch_size": 8})
    assert {s.name for s in compared([*runs, other]).settings} == {"lora, r=4", "lora, r=8", "ia3"}
    larger = run("lora", 0, 0.6, settings=lora(8, 16))
    assert "lora, r=8, data.batch_size=16" in {s.name for s in compared([*runs, larger]).settings}


def test_the_rate_that_each_method_has_of_its_own_is_no_part_of_its_name():
    runs = [run(name, 0, 0.9, settings={"optimizer.lr": rate}) for name, rate in (("lora", 1e-3), ("ia3", 1e-2))]
    assert {s.name for s in compared(runs).settings} == {"lora", "ia3"}
    tried = run("lora", 0, 0.8, settings={"optimizer.lr": 1e-4})
    assert {s.name for s in compared([*runs, tried]).settings} == {
        "lora, optimizer.lr=0.001",
        "lora, optimizer.lr=0.0001",
        "ia3",
    }


def test_no_two_settings_have_one_name():
    def decayed(number, seed):
        return run("lora", seed, 0.9, settings={"optimizer.weight_decay": number})

    (same,) = compared([decayed(0, 0), decayed(0.0, 1)]).settings
    assert len(same.runs) == 2, "0 and 0.0 are one number"
    names = [s.name for s in compared([replace(decayed("0.1", 0), folder=Path("runs/b")), decayed(0.1, 0)]).settings]
    assert len(set(names)) == 2


def test_an_option_that_is_no_methods_own_is_part_of_the_name():
    runs = [run(n, 0, 0.9, settings={"optimizer.lr_decay": d}) for n, d in (("lora", 0.1), ("ia3", 0.2))]
    assert {s.name for s in compared(runs).settings} == {"lora, optimizer.lr_decay=0.1", "ia3, optimizer.lr_decay=0.2"}


def test_trials_beside_a_sweep_are_drawn_by_their_numbers_and_methods_by_their_names():
    names = ("method.r", "method.lora_alpha", "method.lora_dropout", "optimizer.lr")
    trials = [
        replace(run("lora", 0, 0.9, settings=dict.fromkeys(names, n)), folder=Path(f"search/{n}")) for n in (1, 2)
    ]
    settings = compared([*several("ia3", IA3), *trials, run("bitfit", 0, 0.8)]).settings
    assert sorted(numbers(settings).values()) == ["1", "2"]


def test_drawn_numbers_have_as_many_digits_as_tell_them_apart():
    def named(*rates):
        runs = [run("lora", 0, 0.9 - n / 100, settings={"optimizer.lr": rate}) for n, rate in enumerate(rates)]
        return [s.name for s in compared(runs).settings]

    assert named(0.00035123, 0.0123456) == ["lora, optimizer.lr=0.000351", "lora, optimizer.lr=0.0123"]
    assert named(0.12341, 0.12342) == ["lora, optimizer.lr=0.12341", "lora, optimizer.lr=0.12342"]


def test_one_seed_twice_is_no_second_sample():
    found = compared([run("lora", 0, 0.9), replace(run("lora", 0, 0.8), folder=Path("runs/again"))])
    assert found.settings[0].scores == [0.8]
    assert "Runs that were made again with the same settings and seed do not count: 0." in notes(found)
    assert found.settings[0].spread is None


def test_runs_judged_by_several_metrics_are_refused():
    with pytest.raises(
        ValueError, match=r"by one metric, but got val/accuracy \(max\) in runs/lora/0, val/loss \(min\) in runs/ia3/0"
    ):
        compared([run("lora", 0, 0.9), run("ia3", 0, 0.5, monitor="val/loss", mode="min")])


def test_a_front_has_what_no_other_beats_in_both():
    costs = {"best": 100.0, "worse_and_dearer": 120.0, "cheap": 10.0, "between": 50.0, "same_as_between": 50.0}
    scores = {"best": 0.9, "worse_and_dearer": 0.8, "cheap": 0.6, "between": 0.7, "same_as_between": 0.7}
    settings = compared([run(name, 0, score) for name, score in scores.items()]).settings
    assert pareto(settings, lambda s: costs[s.name], 1) == {"best", "cheap", "between", "same_as_between"}
    assert pareto(settings, lambda s: costs[s.name], -1) == {"cheap"}, "where less of the metric is better"
    assert pareto(settings, lambda s: None, 1) == frozenset()


def test_the_chance_of_a_difference_is_welchs_with_holms_correction_for_all_pairs():
    found = compared([*several("lora", LORA), *several("ia3", IA3), *several("full", FULL)])
    best, *others = found.settings
    raw = {s.name: stats.ttest_ind(best.scores, s.scores, equal_var=False).pvalue for s in others}
    (least, small), (most, large) = sorted(raw.items(), key=lambda item: item[1])
    assert found.p_values[least] == pytest.approx(3 * small), "three settings make three pairs"
    assert found.p_values[most] == pytest.approx(min(1, max(2 * large, 3 * small)))
    assert found.p_values[best.name] is None


def test_where_there_is_no_difference_few_reports_find_one():
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        scores = draw.normal(0.8, 0.01, (10, 5)).astype(np.float32)
        runs = [r for number, row in enumerate(scores) for r in several(f"m{number}", map(float, row))]
        found += any(p is not None and p < 0.05 for p in compared(runs).p_values.values())
    assert found <= 10, "5 of 100 are expected at most"


def test_where_nothing_varies_but_by_rounding_nothing_is_told_of_chance():
    same = [float(np.float32(0.9)), 0.9]
    assert compared([*several("lora", same), *several("ia3", (0.5, 0.5))]).p_values["ia3"] is None


def test_what_could_not_be_tested_is_not_said_to_differ():
    runs = [*several("lora", (0.9, 0.901, 0.902)), *several("ia3", (0.5, 0.501, 0.502)), run("head", 0, 0.89)]
    assert "All that could be tested differ from lora at p < 0.05." in notes(compared(runs))


def test_a_seed_that_is_the_runs_own_is_no_setting_and_a_fixed_one_splits_nothing():
    own = [run("lora", seed, 0.9, settings={"data.seed": seed}) for seed in (0, 1, 2)]
    assert [len(s.runs) for s in compared(own).settings] == [3]
    fixed = [run("lora", seed, 0.9, settings={"data.seed": 0}) for seed in (0, 1, 2)]
    assert [s.name for s in compared(fixed).settings] == ["lora"]


def test_memory_that_was_measured_and_memory_that_was_counted_make_no_front():
    mixed = [run("lora", 0, 0.9, peak_bytes=5, peak_measured=True), run("ia3", 0, 0.8, peak_bytes=4)]
    assert compared(mixed).by_memory == frozenset()
    (memory,) = (column for column in columns(compared(mixed)) if column.title == "memory")
    assert "counted by the forecast or measured on the GPU" in memory.note


def test_small_losses_have_the_digits_that_tell_them_apart():
    found = compared([run("lora", 0, 0.0004, mode="min"), run("ia3", 0, 0.00042, mode="min")])
    assert columns(found)[0].shown == ["0.000400", "0.000420"]


def test_one_seed_tells_nothing_of_chance():
    found = compared([run("lora", 0, 0.9), run("ia3", 0, 0.5)])
    assert found.p_values == {"lora": None, "ia3": None}
    assert "with one seed" in found.reason
    assert "Settings with one seed have no spread: their differences may be chance." in notes(found)


def test_a_best_that_few_seeds_do_not_tell_from_others_is_said_to_be_so():
    found = compared([*several("full", (0.90, 0.80)), *several("lora", (0.70, 0.69))])
    assert found.recommended == "full"
    assert found.reason.endswith("; but so few seeds do not tell it from lora")


def test_the_cheapest_of_those_as_good_as_the_best_is_recommended():
    # the best's standard error is 0.01 / sqrt(3), about 0.006
    runs = several("full", (0.90, 0.91, 0.92), peak_bytes=900, trained=9000)
    runs += several("lora", (0.90, 0.91, 0.913), peak_bytes=500, trained=400)
    runs += several("head", (0.80, 0.80, 0.81), peak_bytes=100, trained=10)
    found = compared(runs)
    assert found.recommended == "lora"
    assert "within one standard error (0.0058) of the best, full with 0.91, and takes 500 B" in found.reason
    without = [run(r.method, r.seed, r.score, trained=r.trained) for r in runs]
    assert "trains 400 parameters instead of 9,000" in compared(without).reason


@pytest.fixture
def report(tmp_path):
    curve = ((10, 0.5), (20, 0.9))
    runs = several("lora", LORA, step_seconds=0.1, peak_bytes=5_000_000, curve=curve, checkpoint_bytes=4000)
    runs += several("<b>", IA3, step_seconds=0.05, peak_bytes=4_000_000, curve=curve, checkpoint_bytes=400)
    found = compared(runs)
    return found, write_report(found, {Path("runs/cut"): "did not end"}, tmp_path / "report")


def test_a_report_is_one_page_with_its_pictures_and_numbers_beside_it(report):
    found, page = report
    names = {path.name for path in page.parent.iterdir()}
    drawn = ("metric_against_memory", "metric_against_time", "metric_against_parameters", "learning_curves")
    assert names == {PAGE, "settings.csv", "runs.csv", *(f"{d}.{kind}" for d in drawn for kind in ("png", "svg"))}
    text = page.read_text()
    assert not re.search(r"(src|href)=", text.replace('xlink:href="#', "").replace('href="#', "")), "nothing beside it"
    assert "<b>" not in text, "names are no markup"
    assert "runs/cut" in text
    assert text.count('<g class="method-0"><title>lora</title>') >= 4, "a setting's marks are found by its class"
    with (page.parent / "settings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], row["seeds"], row["recommended"]) for row in rows] == [
        ("lora", "3", "True"),
        ("<b>", "3", "False"),
    ]
    assert float(rows[0]["val/accuracy mean"]) == found.settings[0].score
    with (page.parent / "runs.csv").open() as file:
        assert [float(row["best val/accuracy"]) for row in csv.DictReader(file)] == [*LORA, *IA3]


def test_what_was_forgotten_is_drawn_by_method_and_by_layer(tmp_path):
    runs = several("lora", LORA, forgetting=0.1, layers={"0": 0.05, "1": 0.15})
    found = compared(runs + several("full", FULL, forgetting=0.3, layers={"0": 0.2, "1": 0.4}))
    write_report(found, {}, tmp_path)
    assert {"forgetting.png", "drift.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert [column.shown for column in columns(found) if column.title == "forgot"] == [["0.1 ± 0", "0.3 ± 0"]]


def test_numbers_that_nobody_took_are_no_columns():
    assert [c.title for c in columns(compared(several("lora", LORA)))] == ["val/accuracy", "trained"]


def test_the_front_is_told_of_whoever_is_on_it():
    one = several("lora", LORA, step_seconds=0.1)
    assert fronts(compared(one)) == []
    assert fronts(compared(one + several("ia3", IA3, step_seconds=0.2))) == [
        "No other is as good in as little time: lora."
    ]
    both = fronts(compared(one + several("ia3", IA3, step_seconds=0.05)))
    assert both == ["No other is as good in as little time: all."]


def test_a_pruned_trial_is_marked_in_the_table_and_the_numbers(tmp_path):
    found = compared(several("lora", LORA) + several("ia3", IA3, pruned=True))
    assert [column.shown for column in columns(found) if column.title == "ended"] == [["", "pruned"]]
    page = write_report(found, {}, tmp_path)
    with (page.parent / "settings.csv").open() as file:
        assert [row["pruned"] for row in csv.DictReader(file)] == ["False", "True"]


def test_what_is_forgotten_has_its_unit_and_its_spread():
    runs = [*several("lora", LORA[:2], forgetting=0.1, forgetting_kind="loss")]
    (first, second) = (replace(run, forgetting=value) for run, value in zip(runs, (0.1, 0.3), strict=True))
    (column,) = (c for c in columns(compared([first, second])) if c.title == "forgot")
    assert column.shown == ["0.2 ± 0.14"]
    assert "growth of the loss on held-out text (nats a token)" in column.note
