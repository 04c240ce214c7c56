"""The summary of the data on screens of several kinds, and as a page."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lightning_peft.analysis.data_page import write_data_page
from lightning_peft.analysis.data_report import bars, print_data
from lightning_peft.analysis.data_summary import (
    Cut,
    DataSummary,
    Piece,
    Shown,
    ShownImage,
    ShownText,
    SplitSummary,
    Spread,
    TokenCounts,
    percent,
)


@pytest.fixture
def summary():
    labels = {f"label number {i} <of> many": 100 - i for i in range(20)}
    spreads = {"length": Spread.of([3, 5, 8, 64, 64, 64], "tokens", 64)}
    cut = Cut(1000, 312, 150_000, 26_544, 6_000, 2_544, 301)
    numbers = {"tokens": TokenCounts(123_456, 3_456, cut), "spreads": spreads, "streamed": False}
    again = {"duplicates": 3, "same_inputs": 0, "in_training": 0, "inputs_in_training": 0}
    train = SplitSummary(examples=2_000, rows=2_000, labels=labels, **numbers, **again)
    validation = SplitSummary(examples=1_000, rows=1_000, labels={"x": 3}, **numbers, **again)
    pieces = (Piece("say " * 90 + "<b>:", False), Piece(" red", True), Piece(" green", True, "B-COLOUR"))
    shown = Shown("train", "texts.jsonl, line 3", {"label": "a & b"}, ShownText({"input": pieces}, 64, 2, 99))
    return DataSummary(
        "tagging",
        "a.jsonl",
        "cut to 64 tokens",
        "T, 99 tokens",
        {"train": train, "validation": validation},
        (shown,),
        ("Beware.",),
    )


def _printed(summary, **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=options.pop("encoding", "utf-8"))
    print_data(summary, Console(file=file, highlight=False, **options))
    file.flush()
    return file.buffer.getvalue().decode(file.encoding)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_and_what_is_learnt_is_marked_without_colour(summary, width):
    said = _printed(summary, width=width)
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= width
    assert "⟦red⟧" in said
    assert "⟦green/B-COLOUR⟧" in said
    for expected in ("31.2%", "42.4%", "123,456", "label number 0", "and 8 labels more", "cut from 99", "Beware."):
        assert expected in said


def test_colour_marks_what_is_learnt_where_there_is_colour(summary):
    said = _printed(summary, width=80, force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[1;32m red", said)
    assert "⟦" not in said
    plain = _printed(summary, width=80, force_terminal=True, color_system="truecolor", no_color=True)
    assert "⟦red⟧" in plain


def test_a_terminal_without_unicode_shows_plain_signs(summary):
    said = _printed(summary, width=60, encoding="ascii")
    assert "[[red]]" in said
    assert "###" in said


def test_a_histogram_shows_every_bin_that_holds_something():
    assert bars(Spread(0, 1, 2, 3, (0, 1, 2, 3, 4), (0, 1, 1000, 500))) == " ▁█▄"


@pytest.mark.parametrize(("part", "said"), [(0, "0.0%"), (1, "<0.1%"), (9_999, ">99.9%"), (10_000, "100.0%")])
def test_a_share_is_not_rounded_to_none_or_all(part, said):
    assert percent(part, 10_000) == said


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_stands_alone_and_shows_texts_as_they_are(summary, tmp_path):
    page = write_data_page(summary, tmp_path).read_text()
    parser = _Links()
    parser.feed(page)
    assert not any(tag in ("script", "link", "img") for tag, _ in parser.seen)
    assert all(a.get("href", a.get("xlink:href", "#")).startswith("#") for _, a in parser.seen)
    assert sum(tag == "svg" for tag, _ in parser.seen) == 2
    assert "&lt;b&gt;:" in page
    assert "<mark>a &amp; b</mark>" in page
    assert "label number 0 &lt;of" in page
    assert "currentColor" in page
    numbers = json.loads((tmp_path / "data.json").read_text())
    assert numbers["splits"]["train"]["tokens"]["cut"]["supervised_lost"] == 2_544
    assert numbers["examples"][0]["text"]["sequences"]["input"][1] == {"text": " red", "supervised": True, "tag": None}


def test_the_page_of_the_same_numbers_is_the_same(summary, tmp_path):
    assert (
        write_data_page(summary, tmp_path / "a").read_bytes() == write_data_page(summary, tmp_path / "b").read_bytes()
    )


def test_of_images_sizes_and_a_small_picture_are_shown_and_nothing_of_tokens(tmp_path):
    spreads = {"width": Spread.of([30, 40], "pixels"), "height": Spread.of([20, 20], "pixels")}
    again = dict.fromkeys(("duplicates", "same_inputs", "in_training", "inputs_in_training"), 0)
    split = SplitSummary(2, 2, False, spreads, None, {"cat": 2}, **again)
    shown = Shown("train", "cats/1.png", {"label": "cat"}, image=ShownImage(30, 20, "aGVsbG8="))
    summary = DataSummary("seeing", "cats", "as 12 x 12 pixels", "P", {"train": split}, (shown,), ())
    said = _printed(summary, width=80)
    assert "train 1 (cats/1.png): 30 x 20 pixels" in said
    assert "⟦cat⟧" in said
    assert "width (pixels)" in said
    assert "token" not in said
    page = write_data_page(summary, tmp_path).read_text()
    assert '<img alt="" src="data:image/png;base64,aGVsbG8=">' in page
    assert "token" not in page.partition("<body>")[2]
    assert json.loads((tmp_path / "data.json").read_text())["splits"]["train"]["tokens"] is None
