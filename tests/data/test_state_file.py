"""Hidden states on disk: each run's own, found by what rows hold, as large as it may be."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.data.state_file import StateFile, row_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_as_they_went_in_whatever_the_order(tmp_path, dtype):
    file = StateFile(tmp_path, 10_000)
    rows = {key: torch.randn(n, 3).to(dtype) for key, n in (("a", 4), ("b", 1), ("c", 2))}
    for key, states in rows.items():
        file.put(key, states)
    assert file.holds(["c", "a"])
    assert not file.holds(["a", "d"])
    assert torch.equal(file.get(["c", "a"]), torch.cat([rows["c"], rows["a"]]))


def test_two_runs_in_one_folder_have_a_file_each(tmp_path):
    one, two = StateFile(tmp_path, 1000), StateFile(tmp_path, 1000)
    one.put("r", torch.ones(2, 2))
    two.put("q", torch.full((2, 2), 7.0))
    assert torch.equal(one.get(["r"]), torch.ones(2, 2))
    one.delete()
    assert torch.equal(two.get(["q"]), torch.full((2, 2), 7.0))
    two.delete()
    assert not list(tmp_path.iterdir())


def test_what_has_no_room_is_not_kept(tmp_path):
    file = StateFile(tmp_path, 40)
    file.put("a", torch.ones(2, 4))
    file.put("b", torch.ones(1, 4))
    assert file.holds(["a"])
    assert not file.holds(["b"])
    assert file.full


def test_a_kept_file_is_found_by_a_run_of_the_same_making_alone(tmp_path):
    file = StateFile(tmp_path, 1000)
    file.put("a", torch.arange(4.0).view(2, 2))
    file.keep({"base": "x"})
    other = StateFile.found(tmp_path, 1000, {"base": "y"})
    assert not other.holds(["a"])
    other.delete()
    again = StateFile.found(tmp_path, 1000, {"base": "x"})
    assert torch.equal(again.get(["a"]), torch.arange(4.0).view(2, 2))
    again.put("b", torch.ones(1, 2))
    meanwhile = StateFile.found(tmp_path, 1000, {"base": "x"})
    assert not meanwhile.holds(["a"])
    meanwhile.delete()
    again.keep({"base": "x"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frozen_layers.bin", "frozen_layers.json"]
    assert StateFile.found(tmp_path, 1000, {"base": "x"}).holds(["a", "b"])


DAMAGED = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "nothing": lambda text: "{}",
    "a function": lambda text: text.replace("float32", "save"),
    "no row": lambda text: text.replace('"shape": [2]', '"shape": [0]'),
    "outside": lambda text: text.replace("[0, 16]", "[8, 16]"),
    "in a token": lambda text: text.replace("[0, 16]", "[0, 12]"),
    "words": lambda text: text.replace("[0, 16]", '"x"'),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_kept_file_with_a_damaged_index_is_computed_anew_and_the_run_goes_on(tmp_path, damage):
    file = StateFile(tmp_path, 1000)
    file.put("a", torch.arange(4.0).view(2, 2))
    file.keep({"base": "x"})
    index = tmp_path / "frozen_layers.json"
    before = index.read_text()
    index.write_text(damage(before))
    assert index.read_text() != before
    with pytest.warns(UserWarning, match=r"frozen_layers.bin is computed anew, since it cannot be read: "):
        again = StateFile.found(tmp_path, 1000, {"base": "x"})
    assert not again.holds(["a"])
    again.put("a", torch.arange(4.0).view(2, 2))
    again.keep({"base": "x"})
    assert torch.equal(StateFile.found(tmp_path, 1000, {"base": "x"}).get(["a"]), torch.arange(4.0).view(2, 2))


def test_a_row_has_its_key_whatever_it_is_padded_with_and_no_other_row_has_it():
    ids = torch.tensor([[5, 9, 6, 0], [5, 6, 9, 0], [5, 6, 7, 7], [0, 5, 6, 0]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
    keys = row_keys({"input_ids": ids}, mask)
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3
    assert row_keys({"input_ids": ids[1:2, :3]}, mask[1:2, :3]) == keys[1:2]
    pictures = torch.randn(2, 3, 4, 4)
    first, second = row_keys({"pixel_values": pictures}, None)
    assert first != second
    assert row_keys({"pixel_values": pictures[1:]}, None) == [second]
