"""The code in the documentation runs, and its commands compose."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers

import lightning_peft
from lightning_peft import LoRA, adapt
from lightning_peft.callbacks.show_data import ShowData

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
PAGES = {p.relative_to(DOCS).as_posix(): BLOCK.findall(p.read_text()) for p in sorted(DOCS.rglob("*.md"))}
QUESTION, ANSWER = {"role": "user"}, {"role": "assistant", "content": "a number"}

NOT_RUN = {
    "tasks/image_classification.md": "its model is on the hub; examples/sort_images.py makes one",
    "tasks/embedding.md": "it reads the folders that two commands have written before",
}
"""Pages whose code cannot run here, with the reason; it is compiled all the same."""

COMPLETE = ("index.md", "coming_from.md", "recipes/", "how/")
"""Pages whose code imports all that it uses, a model aside; the others take a few names as known."""


@pytest.fixture
def here(tmp_path, llama_folder, monkeypatch):
    """A folder with what the pages name: a model and files of rows."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.add_tokens(["<think>", "</think>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "path" / "to" / "model")
    rows = {
        "chat": [
            {"messages": [{**QUESTION, "content": f"What is {i}?"}, ANSWER], "text": f"A {i}."} for i in range(12)
        ],
        "pairs": [{"anchor": f"find {i}", "positive": f"number {i}"} for i in range(12)],
        "topics": [{"text": f"text {i}", "label": ["even"] if i % 2 else ["even", "odd"]} for i in range(12)],
        "train": [{"tokens": ["Ada", str(i)], "tags": ["B-PER", "O"]} for i in range(12)],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _python(page):
    return [code for kind, code in PAGES[page] if kind == "python"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own call
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a run that goes on in a new folder
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("page", [p for p in PAGES if _python(p)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, here):
    codes = [compile(code, page, "exec") for code in _python(page)]
    if page in NOT_RUN:
        pytest.skip(NOT_RUN[page])
    L.seed_everything(0, verbose=False)
    names = {"model": transformers.AutoModelForCausalLM.from_pretrained("path/to/model")}
    if not page.startswith(COMPLETE):
        names |= _known(names["model"])
    for code in codes:
        exec(code, names)


def _known(model):
    """What a reader of a page has: the package's names, and objects under the names that say what they are."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("path/to/model")
    ids = torch.randint(5, 97, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapter = adapt(copy.deepcopy(model), LoRA(r=2))
    adapter.save("out/news")
    return {
        **{name: getattr(lightning_peft, name) for name in lightning_peft.__all__},
        "L": L,
        "torch": torch,
        "ShowData": ShowData,
        "adapter": adapter,
        "name": "path/to/model",
        "batch": batch,
        "prompts": {key: rows[:2] for key, rows in batch.items()},
        "loader": [{**batch, "labels": ids}],
        "tokenizer": tokenizer,
        "task": lightning_peft.SupervisedFineTuning(chat_template="zephyr"),
        "data": lightning_peft.TextDataModule(train_files="chat.jsonl", max_length=64, batch_size=4),
        "module": lightning_peft.PeftModule(
            "path/to/model", LoRA(r=2), lightning_peft.SupervisedFineTuning(chat_template="zephyr")
        ),
        "trainer": L.Trainer(max_steps=1, accelerator="cpu", logger=False),
    }


def commands(page):
    """The lines behind each ``lightning-peft`` of a page."""
    blocks = [code.replace("\\\n", " ") for kind, code in PAGES[page] if kind != "python"]
    lines = [re.sub(r"\s#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line.partition("lightning-peft")[2] for line in lines if re.match(r"(\S*srun |)lightning-peft\b", line)]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(page)])
def test_a_command_composes(page, line):
    from lightning_peft.cli.main import BARE_WORDS
    from lightning_peft.cli.overrides import understood

    words = shlex.split(line)
    command = words[0] if words and words[0].isalpha() else "train"
    overrides = [w for w in words if "=" in w]
    if command in BARE_WORDS:
        overrides = BARE_WORDS[command].as_overrides(words[1:])
    understood(command, overrides)


def test_what_is_not_run_is_there():
    assert not set(NOT_RUN) - {p for p in PAGES if _python(p)}
