"""The embedded data: the Python standard library's docstrings, real English on every machine."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
_SHORTEST = 40
_CLASSES = 11
_VALIDATION = 0.2
_SEED = 0

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Example = dict[str, str]


def classification_examples() -> tuple[list[Example], list[Example]]:
    """Which package does a docstring come from? The eleven with most docstrings are the classes.

    Returns:
        Training and validation examples, ``{"text": ..., "label": ...}``, split 80 to 20, the same every time.
    """
    found = _docstrings()
    common = {p for p, _ in Counter(p for p, _, _ in found).most_common(_CLASSES)}
    return _split([{"text": text, "label": package} for package, text, _ in found if package in common])


def completion_examples() -> tuple[list[Example], list[Example]]:
    """A function's signature as the prompt, the first paragraph of its docstring as the completion.

    Returns:
        Training and validation examples, ``{"prompt": ..., "completion": ...}``, split like the others.
    """
    pairs = [
        {"prompt": f"{signature}\n", "completion": text.split("\n\n")[0].strip()}
        for _, text, signature in _docstrings()
        if signature
    ]
    return _split(pairs)


def retrieval_examples() -> tuple[list[Example], list[Example]]:
    """A function's signature and the first paragraph of its docstring, to be found by one another.

    Returns:
        Training and validation examples, ``{"anchor": ..., "positive": ...}``, split like the others.
    """
    train, validation = (
        [{"anchor": row["prompt"].strip(), "positive": row["completion"]} for row in part]
        for part in completion_examples()
    )
    return train, validation


def module_texts() -> Iterator[str]:
    """Docstrings of whole modules, in an order that is the same every time: no example of the others is made of them.

    Those of the character sets in ``encodings`` are left out, which are one sentence a hundred times.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _files(root)
    random.Random(_SEED).shuffle(paths)
    known: set[str] = set()
    for path in paths:
        tree = None if "encodings" in path.relative_to(root).parts else _parsed(path)
        text = None if tree is None else ast.get_docstring(tree)
        if text and len(text) > _SHORTEST and text not in known:
            known.add(text)
            yield text


def examples_with(*columns: str) -> tuple[list[Example], list[Example]]:
    """The embedded data under the columns that a task learns from.

    Args:
        *columns: inputs and targets.

    Returns:
        Training and validation examples.

    Raises:
        ValueError: if the data has no such columns.
    """
    made = {
        ("text", "label"): classification_examples,
        ("prompt", "completion"): completion_examples,
        ("anchor", "positive"): retrieval_examples,
        ("text",): classification_examples,
    }
    if columns not in made:
        known = " or ".join("+".join(c) for c in made)
        raise ValueError(
            f"the embedded docstrings have no {'+'.join(columns)}, only {known}; give data=files data.train_files=..."
        )
    train, validation = made[columns]()
    return [{c: row[c] for c in columns} for row in train], [{c: row[c] for c in columns} for row in validation]


def _split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    order = list(examples)
    random.Random(_SEED).shuffle(order)
    cut = round(len(order) * (1 - _VALIDATION))
    return order[:cut], order[cut:]


@lru_cache(maxsize=1)
def _docstrings() -> tuple[tuple[str, str, str], ...]:
    """Package or module, docstring, and signature (empty for classes), each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, str]] = {}
    for path in _files(root):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        for text, signature in _of_file(path):
            found.setdefault(text, (package, signature))
    return tuple((package, text, signature) for text, (package, signature) in found.items())


def _files(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(folder) / name for name in files if name.endswith(".py")]
    return sorted(found)


def _parsed(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parsed(path)
    if tree is None:
        return
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and len(text) > _SHORTEST:
            yield text, _signature(node)


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    """Level by level, as ``ast.walk`` finds them; it looks into expressions too, where there are none."""
    level: list[ast.AST] = [tree]
    while level:
        below: list[ast.AST] = []
        for node in level:
            if isinstance(node, Definition):
                yield node
            for field in ("cases", "body", "handlers", "orelse", "finalbody"):
                below += getattr(node, field, ())
        level = below


def _signature(node: Definition) -> str:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return ""
    return f"def {node.name}({ast.unparse(node.args)}):"
