"""Rows under the names that a task knows, from wherever they come."""

from __future__ import annotations

import pytest

from lightning_peft.data.docstrings import classification_examples, completion_examples, examples_with
from lightning_peft.data.files import Example
from lightning_peft.data.problems import RowProblems
from lightning_peft.data.sources import from_dataset, named
from lightning_peft.tasks.columns import Columns

TEXTS = (Columns(("text",), ("label",), ("text_pair",)),)


def _named(row, columns=None, shapes=TEXTS, training=True):
    problems = RowProblems(skip=False)
    found = list(named([Example(row, "a.jsonl, line 7")], columns or {}, shapes, problems, training=training))
    problems.settle("data", len(found))
    return [e.row for e in found]


def test_columns_are_renamed_and_others_left_out_but_for_the_id():
    row = {"sentence": "a", "class": "x", "id": 5, "more": 1}
    assert _named(row, {"text": "sentence", "label": "class"}) == [{"text": "a", "label": "x", "id": 5}]
    by_its_name = {"text": "a", "label": "x", "id": 9, "uid": "u5"}
    assert _named(by_its_name, {"id": "uid"}) == [{"text": "a", "label": "x", "id": "u5"}]
    assert _named({"text": "a"}, training=False) == [{"text": "a"}]
    assert _named({"text": "a", "text_pair": "b", "label": 0}) == [{"text": "a", "text_pair": "b", "label": 0}]


def test_the_shape_that_a_row_fills_is_taken():
    shapes = (Columns(("prompt",), ("completion",)), Columns(("messages",)))
    assert _named({"messages": [1]}, shapes=shapes) == [{"messages": [1]}]
    with pytest.raises(ValueError, match=r"no column 'completion'.*; the task takes prompt\+completion or messages"):
        _named({"prompt": "a", "x": 1, "y": 2}, shapes=shapes[:1] + shapes[1:] + (Columns(("a", "b", "c")),))


def test_of_two_shapes_that_lack_as_much_the_fuller_one_counts():
    shapes = (Columns(("messages",)), Columns(("instruction",), ("output",)), Columns(("prompt",), ("completion",)))
    with pytest.raises(ValueError, match="has no column 'instruction'"):
        _named({"output": "only"}, shapes=shapes)
    with pytest.raises(ValueError, match=r"has no column 'completion' \(name it"):
        _named({"prompt": "only"}, shapes=shapes)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"txt": "a", "label": "x"}, r"line 7 has no column 'text'; did you mean 'txt'\? \(name it with data\.columns"),
        ({"text": None, "label": "x"}, "line 7 has nothing in the column 'text': fill it in or leave the row out"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(row, said):
    with pytest.raises(ValueError, match=said):
        _named(row)


def test_the_first_problems_are_shown_and_all_are_counted():
    problems = RowProblems(skip=False)
    for i in range(9):
        problems.add(f"line {i}", " is odd")
    with pytest.raises(ValueError, match="9 of 29 rows cannot be used") as refused:
        problems.settle("data", 20)
    first, *lines, last = str(refused.value).splitlines()
    assert lines == [*(f"  line {i} is odd" for i in range(5)), "  and 4 more"]
    assert (first, last) == ("data: 9 of 29 rows cannot be used", "(data.on_error=skip leaves such rows out)")
    problems = RowProblems(skip=True)
    problems.add("line 3", " is odd")
    with pytest.warns(UserWarning, match=r"data: line 3 is odd \(left out\)"):
        problems.settle("data", 20)
    problems.add("line 3", " is odd")
    with pytest.raises(ValueError, match="no row is left"):
        problems.settle("data", 0)


def test_a_folder_that_datasets_saved_gives_its_splits(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([{"text": "a", "label": "x"}])
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "several")
    datasets.DatasetDict({"train": part, "valid": part}).save_to_disk(tmp_path / "short")
    assert [e.place[-12:] for e in from_dataset(str(tmp_path / "short"), "validation")] == ["valid, row 1"]
    assert [e.row for e in from_dataset(str(tmp_path / "one"), "train")] == [{"text": "a", "label": "x"}]
    assert len(list(from_dataset(str(tmp_path / "several"), "test"))) == 1
    assert from_dataset(str(tmp_path / "several"), "validation") is None


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas"])
def test_a_saved_folder_gives_plain_rows_whatever_form_it_was_saved_in(tmp_path, form):
    import datasets

    row = {"tokens": ["a", "b"], "tags": [0, 1], "score": 0.5}
    datasets.Dataset.from_list([row, row]).with_format(form).save_to_disk(tmp_path / "saved")
    found = [e.row for e in from_dataset(str(tmp_path / "saved"), "train")]
    assert found == [row, row]
    assert [type(found[0][c]) for c in row] == [list, list, float]


def test_a_hub_name_without_a_network_says_what_to_pass_instead():
    with pytest.raises(ConnectionError, match=r"pass local files .* data\.source=docstrings"):
        from_dataset("nobody/nothing", "train")


def test_a_file_as_a_source_says_where_files_go(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"source=.*rows\.jsonl is a file: give it as train_files"):
        from_dataset(str(tmp_path / "rows.jsonl"), "train")


def test_the_embedded_data_is_there_and_the_same_every_time():
    train, validation = classification_examples()
    assert (train, validation) == classification_examples()
    assert len({r["label"] for r in train}) == 11
    assert 0.19 < len(validation) / len(train + validation) < 0.21
    assert len(train) > 1500
    assert all(len(r["text"]) > 40 for r in train)
    assert not {r["text"] for r in train} & {r["text"] for r in validation}
    pairs, _ = completion_examples()
    assert len(pairs) > 2000
    assert all(r["prompt"].startswith("def ") and r["completion"] for r in pairs)
    assert examples_with("text")[0][0] == {"text": train[0]["text"]}
    with pytest.raises(ValueError, match=r"no words\+tags, only text\+label or prompt\+completion"):
        examples_with("words", "tags")
