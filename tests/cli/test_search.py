"""The words of a search: what they stand for in Optuna."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_peft.cli.search import asked


@pytest.mark.parametrize(
    ("word", "tried"),
    [
        ("choice(4,8,16)", CategoricalDistribution([4, 8, 16])),
        ("true,false", CategoricalDistribution([True, False])),
        ("choice([query,value],all-linear)", CategoricalDistribution(["[query,value]", "all-linear"])),
        ("interval(0.0,0.3)", FloatDistribution(0.0, 0.3)),
        ("int(interval(1,9))", IntDistribution(1, 9)),
        ("tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(1,8,2)", IntDistribution(1, 7, step=2)),
        ("range(0.5,2.0,0.5)", CategoricalDistribution([0.5, 1.0, 1.5])),
    ],
)
def test_what_hydra_writes_is_what_optuna_tries(word, tried):
    assert asked([f"method.r={word}", "seed=1"], None) == ({"method.r": tried}, ["seed=1"])


def test_the_last_word_for_an_option_counts():
    words = [
        "method.r=choice(4,8)",
        "optimizer.lr=interval(0.1,0.2)",
        "method.r=16",
        "++optimizer.lr=interval(0.1,0.3)",
    ]
    assert asked(words, None) == ({"++optimizer.lr": FloatDistribution(0.1, 0.3)}, ["method.r=16"])


def test_a_search_for_nothing_is_refused_with_what_one_writes():
    with pytest.raises(ValueError, match=r"nothing is searched; write choice\(4,8,16\), interval"):
        asked(["method.r=16"], None)
