"""The documentation site builds without a warning, holds every page, and needs no network to be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import lightning_peft

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def _text(page):
    return re.sub(r"<[^>]+>", "", page.read_text())


def test_every_page_is_in_the_navigation(site):
    start = (site / "index.html").read_text()
    navigation = start[start.index('<nav class="md-nav md-nav--primary') :]
    linked = set(re.findall(r'href="([^"#]+)"', navigation)) | {"index.html"}
    assert not [page for page in PAGES if page.with_suffix(".html").as_posix() not in linked]
    assert "changelog.html" in linked


def test_nothing_is_fetched_when_a_page_is_read(site):
    fetched = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//|<link[^>]+rel="?(?:stylesheet|preload)'
        r'[^>]+href="?(?:https?:)?//'
    )
    assert not [p.name for p in site.rglob("*.html") if fetched.search(p.read_text())]


def test_a_drawing_takes_the_colours_of_the_palette_and_a_formula_needs_no_script(site):
    page = (site / "how" / "mechanism.html").read_text()
    assert "<figure" in page
    assert "currentColor" in page
    assert "<math" in (site / "methods" / "deep_prompt.html").read_text()


def test_a_methods_page_shows_what_was_measured(site):
    rows = [json.loads(r) for r in (ROOT / "benchmarks/results/embedded_accuracy.jsonl").read_text().splitlines()]
    for name in ("oft", "prefix_tuning_mlp"):
        found = [r["accuracy"] for r in rows if r["method"] == name]
        page = "prefix_tuning" if name == "prefix_tuning_mlp" else name
        assert f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f}" in _text(site / "methods" / f"{page}.html")
        assert f"{mean(found):.3f}" in _text(site / "choose.html")


def test_every_public_name_is_described(site):
    described = set(
        re.findall(r'id="lightning_peft\.[\w.]*\.(\w+)"', "".join(p.read_text() for p in (site / "api").glob("*.html")))
    )
    assert not set(lightning_peft.__all__) - described


def test_the_search_finds_a_method_by_its_paper(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("2106.09685" in entry["text"] for entry in index["docs"])
