"""Rebuilding modules of all builds from what trained."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback, Selective, adapt, load_adapter, load_from_checkpoint
from lightning_peft.handle import Adapter

METHOD = LoRA(r=4, target_modules=["backbone.fc1", "backbone.fc2"], modules_to_save=["head"])


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class HeadFirst(L.LightningModule):
    """The head stands from the start, the backbone comes in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(8, 3)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "backbone"):
            self.backbone = Backbone()

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Counting(HeadFirst):
    """Built in ``__init__``; its ``setup`` asks the Trainer how long the training is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def setup(self, stage: str) -> None:
        self.steps = self.trainer.estimated_stepping_batches


class Sized(HeadFirst):
    """Asks the Trainer before it builds."""

    def setup(self, stage: str) -> None:
        self.steps = self.trainer.estimated_stepping_batches
        super().setup(stage)


@pytest.fixture
def loader():
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


@pytest.fixture
def saved(trainer, loader, tmp_path):
    """Trains a module and keeps a checkpoint of it."""

    def make(net, method=METHOD, model=None):
        t = trainer(PeftCallback(method, model))
        t.fit(net, loader)
        t.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return make


def test_the_class_of_an_adapted_module_loads_as_the_modules_own(saved, loader):
    net = HeadFirst()
    path = saved(net)
    again = load_from_checkpoint(type(net), path)
    x = torch.randn(3, 6)
    assert isinstance(again, HeadFirst)
    assert torch.equal(again(x), net(x))


def test_setup_is_called_though_something_is_built_already(saved):
    net = HeadFirst()
    again = load_from_checkpoint(HeadFirst, saved(net))
    x = torch.randn(3, 6)
    assert torch.equal(again(x), net(x))
    assert isinstance(again, HeadFirst)


def test_a_setup_that_wants_a_trainer_is_no_obstacle_where_it_builds_nothing(saved):
    net = Counting()
    path = saved(net)
    with pytest.warns(UserWarning, match="All that was saved found its place"):
        again = load_from_checkpoint(Counting, path)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), net(x))


def test_a_setup_that_wants_a_trainer_before_it_builds_is_named_in_the_error(saved):
    path = saved(Sized())
    with pytest.raises(ValueError, match="target_modules") as caught:
        load_from_checkpoint(Sized, path)
    where, note = caught.value.__notes__
    assert where == f"So it was when {path} was loaded."
    assert "Sized.setup('predict') failed without a Trainer" in note
    assert "is not attached to a `Trainer`" in note


class FreshHead(Counting):
    """A pretrained backbone with a head that starts at other values each time."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(torch.seed() % 2**31))

    def setup(self, stage: str) -> None:
        pass


@pytest.mark.parametrize(
    "method",
    [METHOD, Selective(target_modules=["head"]), Selective(parameter_types=["bias"], modules_to_save=["head"])],
    ids=["copy", "in place", "both"],
)
def test_what_trains_in_full_is_no_part_of_the_base(method, saved, loader, trainer, tmp_path):
    net = FreshHead()
    path = saved(net, method)
    again, x = load_from_checkpoint(FreshHead, path), torch.randn(3, 6)
    assert torch.equal(again(x), net(x))
    resumed = FreshHead()
    trainer(PeftCallback(method), max_epochs=3).fit(resumed, loader, ckpt_path=path, weights_only=True)
    assert resumed.trainer.global_step == 12

    folder = Adapter(net).save(tmp_path / "adapter")
    other = FreshHead()
    load_adapter(other, folder)
    assert torch.equal(other(x), net(x))


def test_a_second_adapter_belongs_to_the_base_whatever_the_first_trains(loader, trainer, tmp_path):
    net = Counting()
    first = adapt(net, Selective(parameter_types=["bias"]))
    for parameter in first.parameters():
        nn.init.normal_(parameter)
    second = adapt(net, METHOD, "second")
    folder = second.save(tmp_path / "second")
    load_adapter(Counting(), folder)


def test_a_frozen_part_that_starts_at_random_is_named_as_the_cause(saved, loader, trainer):
    method = LoRA(r=2, target_modules=["backbone.fc1"])
    path = saved(FreshHead(), method)
    with pytest.raises(ValueError, match=r"another base: .*values do not.*modules_to_save"):
        load_from_checkpoint(FreshHead, path)
    wider = FreshHead()
    wider.backbone.fc3 = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"another base: .*names or shapes differ"):
        trainer(PeftCallback(method)).fit(wider, loader, ckpt_path=path, weights_only=True)
    other = LoRA(r=2, target_modules=["backbone.fc1"], modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"another method: modules_to_save was None and is \['head'\] here"):
        trainer(PeftCallback(other)).fit(FreshHead(), loader, ckpt_path=path, weights_only=True)


def test_a_loaded_adapter_is_the_one_that_the_callback_asks_for(loader, trainer, tmp_path):
    """Also where a new head was trained without being asked for."""
    first, second = Counting(), Counting()
    for module in (first, second):  # as from_pretrained leaves a model whose checkpoint lacks the last layer
        module.base_model_prefix = "trunk"
        for name, parameter in module.named_parameters():
            parameter._is_hf_initialized = not name.startswith("head")
    method = LoRA(r=2, target_modules=["fc1"])
    adapt(first, method).save(tmp_path / "a")
    load_adapter(second, tmp_path / "a")
    trainer(PeftCallback(method)).fit(second, loader)
