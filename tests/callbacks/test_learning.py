"""What is to train and would not is named before time is spent on it."""

from __future__ import annotations

import json
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback, PeftModule, Selective, TextDataModule, load_from_checkpoint


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


class Unfreezes(L.LightningModule):
    """Lets a part of the frozen base train after all: before the first step, or in the second one."""

    def __init__(self, when: str = "never") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.when = when
        self.before = self.backbone[1].weight.detach().clone()

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.when in ("held", "grouped"):
            weight = self.backbone[1].weight.requires_grad_(True)
            if self.when == "grouped":
                self.optimizers().add_param_group({"params": [weight]})
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.when == "unfrozen":
            self.backbone[1].weight.requires_grad_(True)
        if self.when == "added":
            self.backbone.append(nn.Linear(8, 8))
        if self.when == "outside":
            self.late = nn.Linear(8, 8)
        held = [p for p in self.parameters() if p.requires_grad or self.when == "held"]
        return torch.optim.SGD(held, lr=0.1)


@pytest.mark.parametrize(
    ("when", "steps", "lost"),
    [
        ("unfrozen", 0, r"1 parameters of the frozen base .*: backbone\.1\.weight\. .*modules_to_save=\['1'\]"),
        ("added", 0, r"2 parameters of the frozen base .*: backbone\.2\.weight, backbone\.2\.bias\. .*\['2'\]"),
        ("held", 1, r"1 parameters of the frozen base .*: backbone\.1\.weight\. "),
        ("grouped", 1, r"1 parameters of the frozen base .*: backbone\.1\.weight\. "),
    ],
)
def test_what_no_checkpoint_would_hold_is_refused_before_the_step_that_trains_it(when, steps, lost, loader, trainer):
    net = Unfreezes(when)
    run = trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone"))
    with pytest.raises(ValueError, match=lost):
        run.fit(net, loader)
    assert run.global_step == steps
    assert torch.equal(net.backbone[1].weight, net.before)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2, target_modules=["0"], modules_to_save=["1"]), Selective(unfreeze_until=1.0), Selective()],
    ids=["a copy", "one after another", "in place"],
)
def test_what_the_method_trains_is_in_the_checkpoint_whenever_its_turn_comes(method, loader, trainer, tmp_path):
    net, run = Unfreezes(), trainer(PeftCallback(method, "backbone"))
    run.fit(net, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, x = load_from_checkpoint(Unfreezes, tmp_path / "a.ckpt"), torch.randn(3, 6)
    assert torch.equal(again(x), net(x))
    assert not torch.equal(net(x), Unfreezes()(x))


@pytest.mark.filterwarnings("ignore:no gradient reached 2 trainable parameters. late")
def test_what_is_added_outside_the_adapted_submodule_is_saved_whole(loader, trainer, tmp_path):
    run = trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone"))
    run.fit(Unfreezes("outside"), loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert {"late.weight", "late.bias"} <= set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])


class Adversarial(Unfreezes):
    """Two optimizers in turns, of which each freezes what the other one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        if self.when == "unfrozen":
            self.backbone[1].weight.requires_grad_(True)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]


@pytest.mark.filterwarnings("ignore:no gradient reached")  # each optimizer's turn leaves the other's without
def test_optimizers_that_take_turns_are_each_looked_at_before_their_steps(loader, trainer):
    run = trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone"))
    run.fit(Adversarial(), loader)
    assert run.global_step == 8
    net = Adversarial()
    net.when = "unfrozen"
    run = trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone"))
    with pytest.raises(ValueError, match=r"backbone\.1\.weight"):
        run.fit(net, loader)
    assert run.global_step == 2
    assert torch.equal(net.backbone[1].weight, net.before)


def test_a_buffer_that_comes_late_is_saved(loader, trainer, tmp_path):
    class Counts(Unfreezes):
        def training_step(self, batch, batch_idx):
            if not hasattr(self.backbone, "seen"):
                self.backbone.register_buffer("seen", torch.zeros(()))
            self.backbone.seen += len(batch[0])
            return super().training_step(batch, batch_idx)

    run = trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone"), max_epochs=1)
    run.fit(Counts(), loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["backbone.seen"] == 8


def test_a_peft_module_whose_base_is_unfrozen_is_refused_too(bert_folder, trainer, tmp_path):
    class Own(PeftModule):
        def configure_optimizers(self):
            self.model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
            return super().configure_optimizers()

    rows = [{"text": "red blue " * (1 + i % 3), "label": i % 2} for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=str(tmp_path / "texts.jsonl"), batch_size=4, max_length=16)
    with pytest.raises(ValueError, match=r"model\.bert\.embeddings\.LayerNorm\.weight.*'bert\.embeddings\.LayerNorm'"):
        trainer().fit(Own(str(bert_folder), LoRA(r=2)), data)


def test_parameters_of_no_module_are_named_as_lost(loader, trainer):
    class Loose(Unfreezes):
        def configure_optimizers(self):
            self.loose = [nn.Parameter(torch.zeros(2))]
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad] + self.loose, lr=0.1)

        def forward(self, x):
            return super().forward(x) + self.loose[0]

    with pytest.warns(UserWarning, match="1 of the parameters that an optimizer trains belong to no module"):
        trainer(PeftCallback(LoRA(r=2, target_modules=["0"]), "backbone")).fit(Loose(), loader)
