"""Regular expressions out of files: what would hang is refused, what people write is taken."""

import re

import pytest

from lightning_peft.core.patterns import refuse_slow_patterns

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        r"(\w+\.?)+q",
        "(.*)*",
        r"(?:[\w.]|[\w.])*!",
        "(?:a|a)*!",
        r"(?:[\w.][\w.]{0,8})*!",
        r"(?:[\w.]?){25}!",
        r"[\w.]?" * 40 + "!",
        "(?:a|ab|abc)" * 40 + "!",
        ".*.*.*.*.*!",
        "(?=(?:a|a)*!)a",
        r"(a)?(?(1)(?:.*)*|b)!",
        "a" * 3000,
    ],
)
def test_what_may_take_an_age_is_refused(pattern):
    with pytest.raises(ValueError, match=r"target_modules: .* may take longer to match"):
        refuse_slow_patterns({"target_modules": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(0|1|2|10|11)\.(self_attn|mlp)\.(q|k|v|o|up|down)_proj",
        r".*\.layers\.\d+\..*(query|value)",
        r"^(?!.*vision)(?!.*lm_head).*_proj$",
        r"(?:.*\.)?layer\.[0-9]{1,2}\.attention\.self\.(query|key|value)",
        r"(?i:.*decoder.*)",
        UNSLOTH,
    ],
)
def test_what_people_write_is_taken_and_fails_to_match_at_once(pattern):
    refuse_slow_patterns({"target_modules": pattern, "rank_pattern": {pattern: 4}})
    name = "base_model.model.language_model.text.layers.11.self_attn.attention.q_proj.and_something_longer"
    assert re.fullmatch(pattern, name + "\n") is None


def test_lists_of_names_are_no_expressions():
    refuse_slow_patterns({"target_modules": ["(a+)+b"], "r": 8})
