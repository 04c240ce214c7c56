"""The data before the first step."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.callbacks.show_data import ShowData


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "red " * (1 + i % 7), "label": "odd" if i % 2 else "even"} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_the_data_is_shown_before_the_plan_and_training_stays_what_it_was(
    bert_folder, texts, trainer, tmp_path, capsys
):
    def trained(*callbacks):
        torch.manual_seed(0)
        module = PeftModule(str(bert_folder), LoRA(r=2, lora_dropout=0.1))
        trainer(*callbacks, max_epochs=1).fit(module, TextDataModule(train_files=texts, batch_size=4, max_length=24))
        return module.adapter.tree.state_dict()

    with_it = trained(ShowData(tmp_path / "run"))
    said = capsys.readouterr().out
    assert said.index("examples") < said.index("LoRA")
    assert "⟦even⟧" in said or "⟦odd⟧" in said
    assert (tmp_path / "run" / "data.html").is_file()
    assert json.loads((tmp_path / "run" / "data.json").read_text())["splits"]["train"]["labels"]
    without = trained()
    assert all(torch.equal(t, with_it[n]) for n, t in without.items())
