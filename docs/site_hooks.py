"""What mkdocs does not do by itself for this site: measured figures, formulas, drawings, pages found by pattern.

The pages stay plain Markdown that reads well where it lies. Figures come from `benchmarks/results/` while the site is
built; formulas in a `math` block become MathML, and drawings become part of the page, so that nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:benchmarks|conf|examples)/[^)#]+)\)")
DRAWING = re.compile(r'<p><img alt="([^"]*)" src="[^"]*drawings/(\w+)\.svg" /></p>')
METHOD = re.compile(r"\bmethod=(\w+)")


@cache
def rows() -> dict[str, tuple[str, ...]]:
    """What each method reached on the embedded task, the most accurate first."""
    return _accuracy().rows()


@cache
def _accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_table", ROOT / "benchmarks" / "accuracy_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def title(path: Path) -> str:
    """A page's first heading."""
    return next(line for line in path.read_text().splitlines() if line.startswith("# "))[2:]


def expanded(nav: list[Any]) -> list[Any]:
    """The navigation with each `folder/*.md` replaced by the folder's pages that are not named elsewhere in it."""
    named = set(re.findall(r"'([\w/]+\.md)'", repr(nav)))

    def pages(pattern: str) -> list[str]:
        found = [p for p in DOCS.glob(pattern) if p.relative_to(DOCS).as_posix() not in named]
        return [p.relative_to(DOCS).as_posix() for p in sorted(found, key=lambda p: title(p).lower())]

    def opened(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [{name: inside(value) for name, value in entry.items()}]
        return pages(entry) if "*" in entry else [entry]

    def inside(value: Any) -> Any:
        if isinstance(value, list):
            return [new for entry in value for new in opened(entry)]
        return pages(value) if "*" in value else value

    return [new for entry in nav for new in opened(entry)]


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A `math` block as MathML, which browsers draw without a script."""
    lines = [convert(line, display="block") for line in source.strip().split("\n\n")]
    return "".join(f'<div class="formula">{line}</div>' for line in lines)


def measured(names: list[str], pages: str | None = None) -> str:
    """The table of what some methods reached on the embedded task, by name; HF PEFT's column if one was compared.

    Args:
        names: The methods.
        pages: The folder of the methods' pages, to which a name links where it has one of its own.
    """
    heads = ["`method=`", "trained parameters", "checkpoint", "accuracy", "HF PEFT's"]
    columns = 5 if any(rows()[name][5] for name in names) else 4
    lines = [f"| {' | '.join(heads[:columns])} |", "|---|" + "---:|" * (columns - 1)]
    for name in names:
        page = pages is not None and (DOCS / "methods" / f"{name}.md").exists()
        shown = f"[`{name}`]({pages}/{name}.md)" if page else f"`{name}`"
        lines.append(f"| {' | '.join([shown, *rows()[name][2:]][:columns])} |")
    return "\n".join(lines)


def with_columns(table: str) -> str:
    """A table whose rows each name a method, with what that method reached as further columns."""
    head, rule, *body = table.strip().splitlines()
    lines = [f"{head} trained | checkpoint | accuracy |", f"{rule}---:|---:|---:|"]
    for line in body:
        found = METHOD.search(line)
        trained, size, accuracy = rows()[found[1]][2:5] if found and found[1] in rows() else ("", "", "")
        lines.append(f"{line} {trained} | {size} | {accuracy.partition(' ')[0]} |")
    return "\n".join(lines)


def _results(markdown: str) -> str:
    """A method's page with the section of its results, before its options."""
    names = [n for n in dict.fromkeys(METHOD.findall(markdown)) if n in rows()]
    if not names:
        return markdown
    text = (
        "## Measured\n\nOn the embedded task, as in [the table of all methods](../choose.md#all-methods):\n\n"
        f"{measured(names)}\n\n"
    )
    before, heading, after = markdown.partition("## Options\n")
    return f"{before}{text}{heading}{after}" if heading else f"{markdown}\n\n{text}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Finds the pages, and says what a `math` block becomes."""
    config.nav = expanded(config.nav)
    fences = [{"name": "math", "class": "math", "format": formula}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the changelog, and the files outside of `docs` that a page links to."""
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    pages = [f.content_string for f in files.documentation_pages()]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page)}):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the measured figures in, and links to copies of the files that lie outside of `docs`."""
    uri = page.file.src_uri
    up = "../" * uri.count("/")
    if page.parent is None:  # nothing to navigate beside it
        page.meta.setdefault("hide", ["navigation"])
    markdown = OUTSIDE.sub(lambda found: f"]({up}files/{found[1]})", markdown)
    if uri.startswith("methods/"):
        return _results(markdown)
    markdown = markdown.replace("<!-- all methods -->", measured(list(rows()), up + "methods"))
    return re.sub(r"<!-- measured -->\n((?:\|.*\n)+)", lambda found: with_columns(found[1]) + "\n", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws the drawings in the page itself, where they take the palette's colours."""
    return DRAWING.sub(lambda found: _drawing(found[2], found[1]), html)


def _drawing(name: str, text: str) -> str:
    svg = (DOCS / "drawings" / f"{name}.svg").read_text()
    return f'<figure class="drawing">{svg}<figcaption>{text}</figcaption></figure>'


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Takes the search's script from the site, where the theme would fetch it."""
    return _own_script(output, "../" * page.url.count("/"))


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same in the page of what is not found."""
    return _own_script(output, "/")


def _own_script(html: str, up: str) -> str:
    return html.replace("https://unpkg.com/iframe-worker/shim", f"{up}search_from_disk.js")
