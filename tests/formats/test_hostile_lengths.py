"""Lists as long as a file likes: what is in them is compared once, and an error tells of the first few."""

from __future__ import annotations

import json

import pytest

from lightning_peft import LoRA, adapt, load_adapter
from lightning_peft.core.matching import matches, matching, unmatched

MANIFEST, PEFT = "lightning_peft.json", "adapter_config.json"
MANY = [f"quer{i}" for i in range(30_000)]
SLOW = {
    # each of these took minutes, for each name was compared with each module's to find the nearest
    "targets": (MANIFEST, ["method", "target_modules"], MANY, "matches no module.*; and 29,992 more"),
    "excluded": (MANIFEST, ["method", "exclude_modules"], MANY, "matches no module.*; and 29,992 more"),
    "saved": (MANIFEST, ["copies"], MANY, "matches no module.*; and 29,992 more"),
    "parameters": (MANIFEST, ["method", "target_parameters"], MANY, "'quer0' matches no parameter"),
    "options": (MANIFEST, ["method"], dict.fromkeys(MANY, 1), "has no option 'quer0'.*; and 29,9.. more"),
    "ranks": (MANIFEST, ["method", "rank_pattern"], dict.fromkeys(MANY, 2), "30,001 expressions take longer"),
    "long": (MANIFEST, ["method", "target_modules"], ["q" * 3 * 10**6], "matches no module|characters more"),
    "of peft": (PEFT, ["target_modules"], MANY, "matches no module.*; and 29,992 more"),
    "of the bridge": (PEFT, [], {"peft_type": "HRA", **dict.fromkeys(MANY, 1)}, "has no option .*; and [0-9,]+ more"),
}


@pytest.fixture
def saved(build, tmp_path):
    return adapt(build("bert"), LoRA(r=2)).save(tmp_path / "a")


@pytest.mark.parametrize(("file", "place", "value", "said"), SLOW.values(), ids=SLOW)
def test_long_lists_of_names_that_mean_nothing_are_refused_in_a_short_sentence(build, saved, file, place, value, said):
    content = json.loads((saved / file).read_text())
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(value, dict) and place != ["method", "rank_pattern"]:
        (holder[place[-1]] if place else holder).update(value)
    else:
        holder[place[-1]] = value
    (saved / file).write_text(json.dumps(content))
    if file == PEFT:
        (saved / MANIFEST).unlink()
    with pytest.raises(ValueError, match=said) as refused:
        load_adapter(build("bert"), saved)
    assert len(str(refused.value)) < 2000


def test_a_list_names_modules_by_their_names_and_what_follows_a_dot(build):
    names = [n for n, _ in build("bert").named_modules()]
    patterns = ["query", "self.query", "layer.1.attention", "uery", "bert.encoder", "", "layer.1.", ".query", "pooler"]
    assert matching(patterns, names) == [n for n in names if any(matches(n, p) for p in patterns)]
    assert unmatched(patterns, names) == [p for p in patterns if not any(matches(n, p) for n in names)]
