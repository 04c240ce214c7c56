"""Reading local files, and what is said of broken ones."""

from __future__ import annotations

import json

import pytest

from lightning_peft.data.docstrings import classification_examples, completion_examples
from lightning_peft.data.sources import read_files, read_hub

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


@pytest.fixture
def write(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.write_text(content)
        return str(path)

    return make


def test_json_lines_csv_and_parquet_give_the_same_rows(write, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = write("a.jsonl", "".join(json.dumps(r) + "\n" for r in ROWS))
    whole = write("a.json", json.dumps(ROWS))
    table = write("a.csv", "text,label\na,x\nb,y\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in (lines, whole, table, str(tmp_path / "a.parquet")):
        assert read_files(path, {}, ("text", "label")) == ROWS
    assert read_files([lines, table], {}, ("text",)) == 2 * [{"text": "a"}, {"text": "b"}]


def test_columns_are_renamed(write):
    path = write("a.jsonl", '{"sentence": "a", "class": "x"}\n')
    assert read_files(path, {"text": "sentence", "label": "class"}, ("text", "label")) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3 is no JSON"),
        ("a.jsonl", '{"txt": "a"}\n', r"row 1 has no column 'text'; did you mean 'txt'\?"),
        ("a.jsonl", '["a"]\n', r"row 1 is a list; expected an object"),
        ("a.jsonl", "", r"holds no example"),
        ("a.csv", "text,label\na,x\nb\n", r"line 3: 1 fields, but the header has 2"),
        ("a.csv", "text,label\na,x,z\n", r"line 2: 3 fields, but the header has 2"),
        ("a.xls", "", r"ends in '\.xls'; expected one of \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(write, name, content, said):
    with pytest.raises(ValueError, match=said):
        read_files(write(name, content), {}, ("text",))


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write("texts.jsonl", "")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'texts\.jsonl'"):
        read_files(str(tmp_path / "text.jsonl"), {}, ("text",))


def test_a_hub_name_without_a_network_says_what_to_pass_instead():
    with pytest.raises(ConnectionError, match=r"pass local files .* data\.source=docstrings"):
        read_hub("nobody/nothing", "train", {}, ("text",))


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
