"""The report of a comparison in a real browser: its table sorts, its methods can be hidden, and nothing goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_peft.analysis.comparison import compared
from lightning_peft.analysis.comparison_report import write_report
from lightning_peft.analysis.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three methods, opened; what the browser complained of is in ``page.said``."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = {"lora": (0.90, 342_155, 0.14), "full": (0.91, 22_717_451, 0.21), "head": (0.80, 4_235, 0.05)}
    runs = [
        Run(
            Path(f"runs/{name}/{seed}"),
            name,
            seed,
            {},
            "val/accuracy",
            "max",
            score + seed / 1000,
            {},
            trained,
            step_seconds=seconds,
            peak_bytes=int(1e9 * seconds),
            curve=((10, 0.5), (20, score)),
        )
        for name, (score, trained, seconds) in found.items()
        for seed in range(3)
    ]
    report = write_report(compared(runs), {}, tmp_path_factory.mktemp("report"))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(report.as_uri())
        yield page
        browser.close()


def column(page, number):
    return page.locator(f"#settings tbody tr td:nth-child({number})").all_inner_texts()


def test_a_click_on_a_heading_sorts_by_its_numbers_and_another_turns_the_order(page):
    titles = [title.lower() for title in page.locator("#settings th").all_inner_texts()]
    place = titles.index("trained") + 1
    head = page.locator(f"#settings th:nth-child({place}) button")
    head.click()
    assert column(page, place) == ["4.24 k", "342 k", "22.7 M"]
    assert page.locator(f"#settings th:nth-child({place})").get_attribute("aria-sort") == "ascending"
    head.click()
    assert [name.strip() for name in column(page, 1)] == ["full", "lora", "head"]
    assert page.said == []


def shown(page, name):
    """Whether each of a setting's marks is drawn."""
    group = page.locator("#settings tbody tr", has_text=name).locator("input").get_attribute("value")
    return page.locator(f".{group}").evaluate_all("marks => marks.map(m => getComputedStyle(m).display !== 'none')")


def test_a_tick_taken_away_hides_a_setting_in_every_drawing(page):
    tick = page.locator("#settings tbody tr", has_text="head").locator("input")
    marks = shown(page, "head")
    assert len(marks) >= 4
    assert all(marks)
    tick.uncheck()
    assert not any(shown(page, "head"))
    assert all(shown(page, "lora"))
    tick.check()
    assert all(shown(page, "head"))
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_the_page_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ink, paper = page.evaluate("() => ['color', 'backgroundColor'].map(what => getComputedStyle(document.body)[what])")
    assert _contrast(ink, paper) > 7, "WCAG 2.2, level AAA"
    drawn = page.locator("svg text").first.evaluate("letters => getComputedStyle(letters).fill")
    assert drawn == ink, "the drawings have the page's colour"


def test_a_narrow_window_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 420
    page.set_viewport_size({"width": 1280, "height": 900})


def _contrast(first, second):
    """The contrast of two colours such as ``rgb(28, 30, 33)``, as WCAG 2.2 defines it."""

    def luminance(colour):
        shares = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
