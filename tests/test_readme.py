"""The README's code runs, and its commands compose."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


class MyModule(L.LightningModule):
    """What a reader of the README has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 8), torch.arange(8) % 2), 4)

    test_dataloader = train_dataloader


@pytest.mark.parametrize("code", [c for kind, c in BLOCKS if kind == "python"], ids=lambda c: c.split("\n")[0])
def test_the_code_in_the_readme_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"MyModule": MyModule, "datamodule": Data(), "model": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}
    exec(compile(code, "README.md", "exec"), names)


def _commands():
    lines = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.split("/")[-1].startswith("lightning-peft")]


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_the_commands_in_the_readme_compose(words):
    from lightning_peft.cli.main import BARE_WORDS
    from lightning_peft.cli.overrides import understood

    command = words[0] if words and words[0].isalpha() else "train"
    overrides = [w for w in words if "=" in w]
    if command in BARE_WORDS:
        overrides = BARE_WORDS[command].as_overrides(words[1:])
    understood(command, overrides)


def test_the_make_targets_and_the_pip_commands_in_the_readme_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    for extras in re.findall(r'pip install -c constraints.txt -e "(.*?)"', README):
        assert f'install -q -c constraints.txt -e "{extras}"' in makefile
    assert "-m pytest -n 2" in README
    assert "-m pytest -n 2" in makefile


def test_the_readmes_table_is_what_was_measured():
    spec = importlib.util.spec_from_file_location("accuracy_table", ROOT / "benchmarks" / "accuracy_table.py")
    accuracy_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accuracy_table)
    assert accuracy_table.PLACE.search(README).group() == accuracy_table.table()
