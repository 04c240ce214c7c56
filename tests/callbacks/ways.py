"""A LightningModule with a PeftCallback, and a PeftModule: what holds for the one must hold for the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback, PeftModule, TextDataModule, load_from_checkpoint


class Net(L.LightningModule):
    """A backbone with a batch norm and modules of misleading names, and a head outside it."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        names = {"adapter": nn.Linear(6, 16), "norm": nn.BatchNorm1d(16), "lora_A": nn.Linear(16, 8)}
        self.backbone = nn.Sequential()
        for name, layer in names.items():
            self.backbone.add_module(name, layer)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"])


class Rows(L.LightningDataModule):
    """Thirty-two rows, shuffled."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(3)) + 1
        self.data = TensorDataset(x, (x[:, 0] > 1).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size)

    test_dataloader = val_dataloader


@dataclass
class Way:
    """One of the two ways in which a LightningModule gets its adapter.

    Attributes:
        make: a new LightningModule, always with the same weights.
        data: a new DataModule.
        load: a module from a checkpoint.
        run: a module's output for fixed inputs, in evaluation mode.
        base: a parameter of the base that no adapter trains.
        adapter: a parameter of the adapter.
        rate: a module's learning rate.
        callbacks: makes what its Trainer needs.
    """

    make: Callable[[], Any]
    data: Callable[[], Any]
    load: Callable[[Path], Any]
    run: Callable[[Any], torch.Tensor]
    base: str
    adapter: str
    rate: Callable[[Any], float]
    callbacks: Callable[[], list[L.Callback]] = field(default=list)


def keys_of(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["state_dict"])


def is_small(way: Way, path: Path) -> bool:
    return way.base not in keys_of(path) and way.adapter in keys_of(path)


def everything(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, base included."""
    return {n: t.detach().clone() for n, t in (*module.named_parameters(), *module.named_buffers())}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = everything(module)
    return now.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in now.items())


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have the same state, to the bit; the base is in none."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def without_batch_norm(module):
    if isinstance(module, Net):
        module.backbone.norm = module.head[0] = nn.Identity()
    return module


@pytest.fixture(params=["callback", "module"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    if request.param == "callback":
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
        return Way(
            Net,
            Rows,
            lambda path: load_from_checkpoint(Net, path),
            lambda net: net.eval()(x).detach(),
            "backbone.adapter.weight",
            "backbone.adapters.default.adapter.lora_B",
            lambda net: net.hparams["lr"],
            lambda: [PeftCallback(LoRA(r=2, lora_dropout=0.1), "backbone")],
        )
    words = ("red", "green", "blue", "small", "large")
    rows = [{"text": " ".join([words[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(32)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = str(request.getfixturevalue("bert_folder"))
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(9))

    def make() -> PeftModule:
        torch.manual_seed(0)
        return PeftModule(folder, LoRA(r=2, lora_dropout=0.1), optimizer={"lr": 0.01})

    return Way(
        make,
        lambda: TextDataModule(
            train_files=str(path), test_files=str(path), batch_size=4, max_length=16, validation_fraction=0.25
        ),
        lambda path: PeftModule.load_from_checkpoint(path, weights_only=True),
        lambda module: module.eval()(input_ids=ids).logits.detach(),
        "model.bert.encoder.layer.0.attention.self.query.weight",
        "model.adapters.default.bert.encoder.layer.0.attention.self.query.lora_B",
        lambda module: module.configure_optimizers()["optimizer"].defaults["lr"],
    )
