"""Folders that are to hold a model: what is missing is named before transformers is asked."""

from __future__ import annotations

import shutil

import pytest

from lightning_peft import LoRA, adapt
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel

TASK = {"name": "text_classification", "labels": ["a", "b"]}


def test_an_existing_folder_without_a_model_says_what_it_lacks(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    base = BaseModel(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no weights .* there is: \['notes.txt'\]$"):
        base.load(task_from_config(TASK))
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no tokenizer \(tokenizer.json, vocab.txt or"):
        base.load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; there is"):
        base.positions()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(tokenizer.json"):
        BaseModel("x", tokenizer=str(tmp_path)).load_tokenizer()


def test_a_model_without_its_weights_or_its_tokenizer_is_refused(bert_folder, tmp_path):
    shutil.copy(bert_folder / "config.json", tmp_path)
    base = BaseModel(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no weights .*; there is: \['config.json'\]"):
        base.load(task_from_config(TASK))
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer"):
        base.load_tokenizer()
    assert base.positions() == 128
    assert len(BaseModel("x", tokenizer=str(bert_folder)).load_tokenizer()) > 5


def test_an_adapters_folder_given_as_the_model_is_told_apart(build, tmp_path):
    adapt(build("bert"), LoRA(r=2)).save(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="this is an adapter's folder, so give its base as the model"):
        BaseModel(str(tmp_path / "adapter")).load_tokenizer()
