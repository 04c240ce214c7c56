"""Every method has a page, and the pages say what is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import lightning_peft

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
YAMLS = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT / "conf" / "method").glob("*.yaml"))}


def _class(stem):
    return getattr(lightning_peft, YAMLS[stem]["_target_"].rpartition(".")[2])


@pytest.mark.parametrize("stem", YAMLS)
def test_a_method_is_on_a_page_with_its_command(stem):
    pages = [p.read_text() for p in PAGES.glob("*.md")]
    assert any(re.search(rf"\bmethod={stem}\b", p) and _class(stem).__name__ in p for p in pages)


@pytest.mark.parametrize("cls", dict.fromkeys(_class(stem) for stem in YAMLS), ids=lambda c: c.__name__)
def test_the_pages_of_a_class_name_all_its_options(cls):
    pages = "".join(text for p in PAGES.glob("*.md") if cls.__name__ in (text := p.read_text()))
    assert not [f.name for f in fields(cls) if f"`{f.name}`" not in pages]


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_a_page_makes_methods_that_can_be_made_and_links_to_pages_that_exist(path):
    page = path.read_text()
    for name, options in re.findall(r"PeftCallback\((\w+)(\(.*?\))\)\]", page):
        eval(f"{name}{options}", vars(lightning_peft) | {name: getattr(lightning_peft, name)})
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_a_page_has_a_drawing_that_exists_and_says_when_to_take_the_method(path):
    page = path.read_text()
    (drawing,) = re.findall(r"^!\[[^\]]+\]\((\.\./drawings/\w+\.svg)\)$", page, re.M)
    assert (path.parent / drawing).exists()
    assert {"## When to take it", "## Options"} <= set(page.splitlines())
    assert "## Formula" in page or path.stem == "hf_peft"  # which has as many as PEFT has tuners
