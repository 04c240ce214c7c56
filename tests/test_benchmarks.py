"""The benchmarks run, in small; what they measure is no business of a test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.processes import run_script

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_of_data_loading_writes_its_figures(tmp_path):
    small = ["--steps", "2", "--copies", "1", "--output", str(tmp_path / "found.json")]
    run_script(FOLDER / "data_loading.py", *small, cwd=tmp_path)
    found, kept = (json.loads(p.read_text()) for p in (tmp_path / "found.json", FOLDER / "results/data_loading.json"))
    assert found.keys() == kept.keys()
    assert 0 < found["training"]["waiting_share"] < 1
    assert [some["num_proc"] for some in found["tokenizing"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("one_step", ["--small", "--repeats", "1"]),
        ("start_and_stop", ["--linears", "100", "--repeats", "1"]),
        ("one_adapter_an_example", ["--layers", "1", "--tokens", "8", "--repeats", "1"]),
        ("classification", ["--examples", "32", "--repeats", "1", "--threads", "1"]),
        ("cost_against_size", ["--small", "--repeats", "1", "--threads", "1"]),
        ("forgetting", ["--seeds", "1", "--steps", "1", "--taught", "1"]),
        ("long_run", ["--steps", "100", "--adapters", "12", "--in-use", "4", "--points", "5"]),
    ],
)
def test_a_benchmark_writes_its_figures(name, small, tmp_path):
    words = [*small, "--output", str(tmp_path / "found.json")]
    run_script(FOLDER / f"{name}.py", *words, cwd=tmp_path)
    found, kept = (json.loads(p.read_text()) for p in (tmp_path / "found.json", FOLDER / f"results/{name}.json"))
    assert found.keys() == kept.keys()


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_figures_holds_what_was_measured():
    tables = _loaded("tables")
    assert tables.page(tables.PAGE.read_text()) == tables.PAGE.read_text()


def test_the_page_about_forgetting_holds_what_was_measured():
    forgetting = _loaded("forgetting")
    found = json.loads((FOLDER / "results" / "forgetting.json").read_text())
    assert forgetting.page(forgetting.PAGE.read_text(), found) == forgetting.PAGE.read_text()


def test_the_page_of_learning_rates_holds_what_was_measured():
    rates, table = _loaded("learning_rates"), _loaded("learning_rate_table")
    text = table.PAGE.read_text()
    own = {name: rates.method_named(name).learning_rate for name in rates.METHODS}
    assert table.page(text, rates.RESULTS.read_text(), own) == text


def test_a_table_of_rates_has_the_best_of_a_whole_sweep_and_names_the_methods_without_one():
    def run(method, factor, accuracy):
        return {"method": method, "factor": factor, "lr": 0.002 * factor, "accuracy": accuracy, "loss": None}

    rows = [run("lora", 1.0, 0.7), run("lora", 0.5, 0.8), run("lora", 2.0, 0.2), run("ia3", 1.0, 0.9)]
    said = _loaded("learning_rate_table").table(rows, {"lora": 0.002, "ia3": 0.02, "dora": 0.002})
    assert "| `lora` | 0.002 | 0.700, none | 0.001 | 0.800, none | 0.001, 0.002, 0.004 | 4e-4" in said
    assert "| `ia3` | 0.02 | | | | | 3e-3" in said
    assert said.endswith("Not swept: `ia3`, `dora`.\n")


@pytest.mark.slow
def test_a_sweep_of_rates_makes_the_runs_that_are_missing_and_no_other(tmp_path):
    file = tmp_path / "found.jsonl"
    done = [{"method": "head", "factor": factor, "seed": 0} for factor in (1.0, 0.32, 3.2, 0.1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in done))
    words = ["head", "--steps", "1", "--output", str(file)]
    for _ in range(2):
        run_script(FOLDER / "learning_rates.py", *words, cwd=tmp_path)
        *before, last = (json.loads(line) for line in file.read_text().splitlines())
        assert before == done
        assert (last["factor"], last["lr"], last["steps"]) == (10.0, pytest.approx(10 * last["default"]), 1)
    assert {"accuracy", "loss"} <= last.keys()


def test_the_picture_of_costs_has_a_panel_for_each_size_and_a_line_for_each_figure(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    found = _loaded("tables").read("cost_against_size")
    _loaded("plots").draw(found)
    panels = drawn[0].axes
    for panel, name in zip(panels, ("rank", "layers", "tokens", "adapters"), strict=True):
        by_arithmetic, kept, times, *_ = (list(line.get_ydata()) for line in panel.lines)
        assert times == [row["over_smallest"] for row in found[name].values()]
        assert by_arithmetic == [row["by_arithmetic"] for row in found[name].values()]
        assert kept[0] == 1
    assert list(panels[-1].lines[-1].get_ydata()) == [
        row["over_smallest"] for row in found["adapters in a batch"].values()
    ]
