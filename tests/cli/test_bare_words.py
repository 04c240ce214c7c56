"""Words of a command line that stand alone."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_peft.cli.bare_words import BareWords


@pytest.mark.parametrize(
    "word",
    ["outputs/2026-01-31/12-00-00", "a b", 'a"b', "a\\b", "a\\", 'a\\"', "é,(x)[1]{2}", "12", "null", "a'b", "a:b"],
)
def test_hydra_reads_a_word_as_it_was_typed(word):
    one, several = (
        BareWords(("run",)).as_overrides([word]),
        BareWords(("runs",), several=True).as_overrides([word, "b"]),
    )
    (parsed,) = OverridesParser.create().parse_overrides(one)
    assert (parsed.key_or_group, parsed.value()) == ("run", word)
    (parsed,) = OverridesParser.create().parse_overrides(several)
    assert parsed.value() == [word, "b"]


def test_options_stay_and_a_folder_with_an_equals_sign_is_a_word_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=1").mkdir()
    assert BareWords(("run",)).as_overrides(["seed=1", "check_base=false"]) == ['run="seed=1"', "check_base=false"]
    assert BareWords(("run",)).as_overrides(["run=x"]) == ["run=x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["a", "b"], "one run is expected, but got 'a' and 'b'"), (["a", "run=b"], "run is given twice: 'a' and 'run=b'")],
)
def test_more_than_one_value_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        BareWords(("run",)).as_overrides(words)


def test_two_words_are_the_values_of_two_options_in_their_order():
    both = BareWords(("a", "b"))
    assert both.as_overrides(["one", "two", "to=x"]) == ['a="one"', 'b="two"', "to=x"]
    assert both.as_overrides(["one", "b=two"]) == ['a="one"', "b=two"]
    with pytest.raises(ValueError, match="a and b are expected, but got 'x' and 'y' and 'z'"):
        both.as_overrides(["x", "y", "z"])
    with pytest.raises(ValueError, match="a is given twice: 'x' and 'a=y'"):
        both.as_overrides(["x", "a=y"])
