"""What is to train and would not is named before time is spent on it."""

from __future__ import annotations

import json
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback, PeftModule, TextDataModule


class Early(L.LightningModule):
    """Chooses what its optimizer gets by ``chosen``: before it is adapted, or a part of what trains after it."""

    def __init__(self, chosen: str) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.chosen = chosen
        self.collected = list(self.parameters())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        adapter = list(self.backbone.parameters())
        choices = {"early": self.collected, "adapter": adapter, "half": trained[1:], "all": trained, "none": None}
        chosen = choices[self.chosen]
        return None if chosen is None else torch.optim.SGD(chosen, lr=0.1)


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(8, 6), torch.arange(8) % 2), batch_size=4)


def test_parameters_collected_before_the_adapter_was_there_are_an_error(loader, trainer):
    with pytest.raises(ValueError, match=r"none of the adapter's 2 trainable .*p for p in self\.parameters\(\)"):
        trainer(PeftCallback(LoRA(r=2), "backbone")).fit(Early("early"), loader)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("adapter", r"2 trainable parameters are in no optimizer: head\.weight, head\.bias\."), ("half", "1 trainable")],
)
def test_what_else_is_in_no_optimizer_is_named(chosen, message, loader, trainer):
    with pytest.warns(UserWarning, match=message):
        trainer(PeftCallback(LoRA(r=2), "backbone")).fit(Early(chosen), loader)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("chosen", ["all", "none"])
def test_nothing_is_said_where_all_are_held_or_no_optimizer_is_wanted(chosen, loader, trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*in no optimizer")
        trainer(PeftCallback(LoRA(r=2), "backbone")).fit(Early(chosen), loader)


def test_a_peft_module_with_an_optimizer_of_its_own_is_checked_too(bert_folder, trainer, tmp_path):
    class Own(PeftModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.bert.embeddings.parameters(), lr=0.1)

    rows = [{"text": "red blue " * (1 + i % 3), "label": i % 2} for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(tmp_path / "texts.jsonl"), batch_size=4, max_length=16)
    with pytest.raises(ValueError, match="none of the adapter's"):
        trainer().fit(Own(str(bert_folder), LoRA(r=2)), data)
