"""The code in the documentation runs, and its commands compose."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
PAGES = {p.relative_to(DOCS).as_posix(): BLOCK.findall(p.read_text()) for p in sorted(DOCS.rglob("*.md"))}
CONVERSATION = [{"role": "user", "content": "What colour is grass?"}, {"role": "assistant", "content": "green"}]

NOT_RUN: dict[str, str] = {}
"""Pages whose code cannot run here, with the reason; it is compiled all the same."""

NOT_COMPOSED: dict[str, str] = {}


@pytest.fixture
def here(tmp_path, llama_folder, monkeypatch):
    """A folder with what the pages name: a model and files of rows."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path / "path" / "to" / "model")
    transformers.AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(tmp_path / "path" / "to" / "model")
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": CONVERSATION}) + "\n") * 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _python(page):
    return [code for kind, code in PAGES[page] if kind == "python"]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if _python(p)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, here):
    codes = [compile(code, page, "exec") for code in _python(page)]
    if page in NOT_RUN:
        pytest.skip(NOT_RUN[page])
    L.seed_everything(0, verbose=False)
    model = transformers.AutoModelForCausalLM.from_pretrained("path/to/model")
    names = {"L": L, "torch": torch, "model": model}
    for code in codes:
        exec(code, names)


def _commands(page):
    blocks = [code.replace("\\\n", " ") for kind, code in PAGES[page] if kind != "python"]
    lines = [re.sub(r"\s#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line.partition("lightning-peft")[2] for line in lines if re.match(r"(\S*srun |)lightning-peft\b", line)]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in _commands(page)])
def test_a_command_composes(page, line):
    from lightning_peft.cli.overrides import problem_with

    words = shlex.split(line)
    command = words[0] if words and words[0].isalpha() else "train"
    assert problem_with(command, [w for w in words if "=" in w]) is None


def test_what_is_not_run_is_there():
    assert not set(NOT_RUN) - {p for p in PAGES if _python(p)}
