"""What a method does around the steps of a Trainer is what it does in a loop of one's own."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import AdaLoRA, Adapter, LoRA, PeftCallback, Selective, SparseTuning, adapt


class Net(L.LightningModule):
    """Two linear layers and an optimizer without momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rate = 0.5
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate)


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 6, generator=generator), torch.arange(16) % 4)
    return DataLoader(data, batch_size=4)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_runs_the_schedule_as_a_loop_of_ones_own(trainer, loader, accumulated):
    method = AdaLoRA(target_r=1, init_r=3, tinit=1, tfinal=1, target_modules=["0", "2"])
    module = Net()
    torch.manual_seed(1)
    callback = PeftCallback(method, model="net")
    trainer(callback, max_epochs=3, accumulate_grad_batches=accumulated).fit(module, loader)

    plain = Net()
    torch.manual_seed(1)
    adapter = adapt(plain.net, method)
    optimizer = plain.configure_optimizers()
    step, total = 0, 12 // accumulated
    for _ in range(3):
        for number, batch in enumerate(loader):
            (plain.training_step(batch, number) / accumulated).backward()
            if (number + 1) % accumulated == 0:
                step += 1
                adapter.before_step(step, total)
                optimizer.step()
                adapter.after_step(step, total)
                optimizer.zero_grad()
    trained = callback.adapter(module).state_dict()
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)
    assert sum(int((layer.lora_E != 0).sum()) for layer in adapter.tree.layers_by_module.values()) == 2


def test_a_schedule_without_an_end_is_refused(trainer, loader):
    endless = trainer(PeftCallback(AdaLoRA(init_r=4, target_r=2, target_modules=["0"])), max_epochs=-1)
    with pytest.raises(ValueError, match="this one has no end; set max_epochs or max_steps"):
        endless.fit(Net(), loader)


def test_a_trainer_shows_the_data_once_and_trains_as_without(trainer, loader):
    """The first fit sees the data, a second does not; the loader and the random generators are left as they were."""
    drawn = []

    class Noting(Net):
        def training_step(self, batch, batch_idx):
            if self.training:
                drawn.append((batch[0][0, 0].item(), torch.rand(()).item()))
            return super().training_step(batch, batch_idx)

    shuffled = DataLoader(loader.dataset, batch_size=8, shuffle=True)
    for method in (LoRA(r=2), LoRA(r=2, init_lora_weights="eva")):
        torch.manual_seed(5)
        callback = PeftCallback(method, model="net")
        module = Noting()
        torch.manual_seed(5)
        trainer(callback, max_epochs=2).fit(module, shuffled)
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]
    before = callback.adapter(module).state_dict()["0.lora_A"].clone()
    assert not callback.adapter(module).needs_data
    module.rate = 0.0  # so that only a second start could move it
    trainer(PeftCallback(method, model="net"), max_epochs=1).fit(module, shuffled)
    assert torch.equal(callback.adapter(module).state_dict()["0.lora_A"], before)


@pytest.mark.parametrize("method", [Selective(), AdaLoRA(target_modules=["0"], total_step=3, init_r=4, target_r=2)])
def test_a_method_with_no_schedule_or_one_of_its_own_trains_without_an_end(trainer, loader, method):
    trainer(PeftCallback(method, model="net"), max_epochs=-1, max_time={"seconds": 1}).fit(Net(), loader)


def test_a_schedule_longer_than_the_training_is_refused_before_its_first_step(trainer, loader):
    module = Net()
    with pytest.raises(ValueError, match="tinit=5 and tfinal=4 leave none of the 8 steps"):
        trainer(PeftCallback(AdaLoRA(tinit=5, tfinal=4, init_r=4, target_r=2), model="net")).fit(module, loader)
    assert all(p.grad is None for p in module.parameters())


def test_data_is_seen_as_the_training_sees_it(trainer, loader):
    """A step that takes no batch number, and several loaders that make one batch."""

    class Plain(Net):
        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch["one"][0]), batch["two"][1])

    method = LoRA(r=2, init_lora_weights="eva")
    callback = PeftCallback(method, model="net")
    module = Plain()
    trainer(callback, max_epochs=1).fit(module, {"one": loader, "two": loader})
    assert not callback.adapter(module).needs_data


DATA_DRIVEN = [LoRA(r=2, init_lora_weights="eva"), SparseTuning(r=1, mask_type="gradient")]


@pytest.mark.parametrize("method", DATA_DRIVEN, ids=["eva", "fish_mask"])
def test_the_learning_rate_finder_trains_what_the_data_has_chosen_and_puts_it_back(trainer, loader, method, tmp_path):
    class Evaluated(Net):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    module, callback = Evaluated(), PeftCallback(method, model="net")
    t = trainer(callback, max_epochs=1)
    finder = Tuner(t).lr_find(module, loader, loader, num_training=5, attr_name="rate")
    assert len(finder.results["lr"]) > 1
    assert callback.adapter(module).needs_data
    t.fit(module, loader, loader)
    assert not callback.adapter(module).needs_data


@pytest.mark.parametrize("method", DATA_DRIVEN, ids=["eva", "fish_mask"])
def test_a_module_that_optimizes_by_hand_shows_the_data_itself_or_is_told_to(trainer, loader, method):
    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    class Showing(ByHand):
        def on_train_start(self):
            Adapter(self.net).prepare((lambda b=b: self.loss(b)) for b in self.trainer.train_dataloader)

    with pytest.raises(ValueError, match=r"optimizes by hand; call adapter.prepare\(losses\) in on_train_start"):
        trainer(PeftCallback(method, model="net")).fit(ByHand(), loader)
    module = Showing()
    trainer(PeftCallback(method, model="net")).fit(module, loader)
    assert not Adapter(module.net).needs_data
