"""Reading local files, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard

from lightning_peft.data.files import find_files, read_file

ROWS = [{"text": "a\nb", "label": "x"}, {"text": "über", "label": "y"}]


@pytest.fixture
def write(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def _read(path, **options):
    return [e.row if e.row is not None else f"{e.place}{e.problem}" for e in read_file(path, **options)]


def test_every_format_gives_the_same_rows(write, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    paths = [
        write("a.jsonl", lines),
        write("a.json", json.dumps(ROWS)),
        write("lines.json", lines),
        write("a.csv", 'text,label\n"a\nb",x\nüber,y\n'),
        write("a.tsv", 'text\tlabel\n"a\nb"\tx\nüber\ty\n'),
        write("bom.csv", b"\xef\xbb\xbf" + 'text,label\n"a\nb",x\nüber,y\n'.encode()),
        write("a.jsonl.gz", gzip.compress(lines)),
        write("a.jsonl.zst", zstandard.compress(lines)),
        tmp_path / "a.parquet",
        tmp_path / "file.arrow",
        *find_files(tmp_path / "saved"),
    ]
    for path in paths:
        assert _read(path) == ROWS, path


def test_a_plain_text_is_a_row_a_line_or_one_row(write):
    path = write("a.txt", "one\n\ntwo\r\n")
    assert _read(path) == [{"text": "one"}, {"text": "two"}]
    assert _read(path, whole_texts=True) == [{"text": "one\n\ntwo\r\n"}]


def test_one_object_over_several_lines_is_one_row(write):
    assert _read(write("one.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]
    assert _read(write("line.json", json.dumps(ROWS[0]))) == ROWS[:1]


def test_a_string_may_hold_what_unicode_calls_a_line_end(write):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "\U0001f600"}]
    for name in ("a.json", "a.jsonl"):
        for ascii in (True, False):
            path = write(name, "".join(json.dumps(r, ensure_ascii=ascii) + "\n" for r in rows))
            assert _read(path) == rows


def test_folders_and_patterns_give_their_files_in_order_and_each_once(write, tmp_path):
    hidden = ("parts/.ipynb_checkpoints/a-checkpoint.csv", "parts/._a.csv")
    for name in ("parts/b.jsonl", "parts/a.csv", "parts/deep/c.txt.gz", "parts/notes.md", *hidden):
        write(name, "")
    names = [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path / "parts")]
    assert names == ["parts/a.csv", "parts/b.jsonl", "parts/deep/c.txt.gz"]
    assert find_files(str(tmp_path / "parts" / "*.csv")) == [tmp_path / "parts" / "a.csv"]
    assert len(find_files(str(tmp_path / "**" / "*.gz"))) == 1
    assert len(find_files([tmp_path / "parts", tmp_path / "parts" / "a.csv"])) == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3 is no JSON: Expecting value at column"),
        ("a.jsonl", '["a"]\n', "a.jsonl, line 1 is a list; expected an object with columns"),
        ("a.json", '[{"text": "a"}, 3]', "a.json, row 2 is an int; expected an object"),
        ("a.csv", "text,label\na,x\nb\n", "a.csv, line 3 has 1 fields, but the header has 2"),
        ("a.csv", "text,label\na,x,z\n", "a.csv, line 2 has 3 fields, but the header has 2"),
        ("a.csv", 'text,label\n"a" b,x\n', "a.csv, line 2 is no row of a table"),
        ("a.csv", b"text,label\ncaf\xe9,x\n", "a.csv, line 2 is not in UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, line 1 is not in UTF-8"),
        ("a.txt", b"caf\xe9\n", "a.txt, line 1 is not in UTF-8"),
        ("a.json", b'[{"text": "caf\xe9"}]', "a.json, row 1 is not in UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', r"a.jsonl, line 2 has half a character, such as \ud83d"),
        ("a.json", '[{"text": "a"}, {"text": "\\ud83d"}]', r"a.json, row 2 has half a character, such as \ud83d"),
    ],
)
def test_a_broken_row_is_named_with_its_line_and_the_others_are_read(write, name, content, said):
    found = _read(write(name, content))
    broken = [e for e in found if isinstance(e, str)]
    assert len(broken) == 1
    assert said in broken[0]


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.arrow"])
def test_a_file_that_is_none_of_its_kind_says_so(write, name):
    with pytest.raises(ValueError, match=rf"{name}.* (is no JSON|is no (parquet|arrow) file)"):
        _read(write(name, "[{"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12]),
        ("cut.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 9)[:-3]),
        ("half.csv.zst", zstandard.compress(b"text\n" + b"a\n" * 99_999)[:20]),
        ("plain.csv.gz", b"text\na\n"),
        ("plain.jsonl.zst", b'{"text": "a"}\n'),
    ],
    # gzip's header holds the time, so the bytes would name the tests differently in each process.
    ids=["cut gzip", "cut zstandard", "half zstandard", "no gzip", "no zstandard"],
)
def test_a_packed_file_that_is_damaged_is_named(write, name, content):
    with pytest.raises(ValueError, match=rf"{name} cannot be unpacked, it is damaged or cut short: "):
        _read(write(name, content))


def test_names_that_stand_for_nothing_are_errors(write, tmp_path):
    write("texts.jsonl", "")
    write("notes/a.md", "")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'texts\.jsonl'"):
        find_files(tmp_path / "text.jsonl")
    with pytest.raises(FileNotFoundError, match=r"holds no file that can be read; files end in \.jsonl"):
        find_files(tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match="stands for no file that can be read"):
        find_files(str(tmp_path / "*.csv"))
    with pytest.raises(ValueError, match=r"ends in '\.md'; expected one of \.jsonl"):
        find_files(tmp_path / "notes" / "a.md")
