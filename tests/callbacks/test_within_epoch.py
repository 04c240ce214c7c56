"""Runs that go on from the middle of an epoch, of a step, or from just before a validation."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_peft import LoRA, PeftCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
    "ignore:The dirpath has changed from",
    "ignore:'set_vital' is deprecated",  # torchdata calls it
)


class Net(L.LightningModule):
    """Dropout, and a note of every number that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.seen: list[int] = []
        self.judged: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(int(batch[0][0]))
        return self.body(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.judged.append(self.global_step)
        self.log("val_loss", self.body(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def _numbers(kind=DataLoader, **options):
    return kind(TensorDataset(torch.arange(8.0)[:, None]), batch_size=1, **options)


def _fit(trainer, folder, loader, validation=None, ckpt_path=None, every=None, **options):
    """A run of three epochs that keeps a checkpoint of each step, or of ``every``."""
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, enable_version_counter=False, **(every or {}))
    net = Net()
    torch.manual_seed(9 if ckpt_path else 5)
    t = trainer(PeftCallback(LoRA(r=1), model="body"), keep, enable_checkpointing=True, max_epochs=3, **options)
    t.fit(net, loader(), validation, ckpt_path=ckpt_path, weights_only=True)
    return net


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


STEP = {"every_n_train_steps": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [STEP, {"every_n_epochs": 1}], ids=["step", "epoch"])
def test_a_stateful_loader_gives_what_it_would_have_given(trainer, tmp_path, workers, every):
    """From the middle of an epoch, and from its last step, where Lightning alone leaves the whole next epoch out."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return _numbers(loaders.StatefulDataLoader, shuffle=True, num_workers=workers)

    whole = _fit(trainer, tmp_path / "whole", loader, every=every)
    for step in (3, 8, 13, 16) if every is STEP else (8, 16):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        again = _fit(trainer, tmp_path / "again", loader, ckpt_path=path, every=every)
        assert again.seen == whole.seen[step:]
        assert _same(again, whole)


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(8.0)[:, None]


@pytest.mark.parametrize("loader", [_numbers, lambda: DataLoader(Stream(), batch_size=1)], ids=["rows", "stream"])
def test_a_loader_that_cannot_be_restored_begins_at_its_beginning_and_one_warning_says_so(trainer, tmp_path, loader):
    whole = _fit(trainer, tmp_path / "whole", loader, every=STEP)
    assert whole.seen == [*range(8)] * 3
    path = tmp_path / "whole" / "step=11.ckpt"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = _fit(trainer, tmp_path / "again", loader, ckpt_path=path, every=STEP)
    said = [str(w.message) for w in said if "epoch" in str(w.message)]
    assert len(said) == 1
    assert "its DataLoader cannot be put: the rest of the epoch is made of batches from the loader's" in said[0]
    assert "torchdata's StatefulDataLoader" in said[0]
    rest = 8 if loader is not _numbers else 5  # Lightning counts the batches of a loader that has a length
    assert again.seen == [*range(rest), *range(8)]


def test_nothing_is_said_where_an_epoch_begins_anyway(trainer, tmp_path):
    whole = _fit(trainer, tmp_path / "whole", _numbers, every=STEP)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = _fit(trainer, tmp_path / "a", _numbers, ckpt_path=tmp_path / "whole" / "step=16.ckpt", every=STEP)
    assert not [w for w in said if "middle of an epoch" in str(w.message)]
    assert _same(again, whole)


@pytest.mark.parametrize("check", [8, 4])
def test_a_validation_that_was_due_is_made_up_for(trainer, tmp_path, check):
    """The checkpoint is written after the step and before the validation; Lightning alone leaves that out."""
    judge = _numbers()  # a loader of the user's draws from the global generator, which dropout goes by too

    def loader():
        return _numbers(shuffle=True)

    options = {"every": STEP, "val_check_interval": check}
    whole = _fit(trainer, tmp_path / "whole", loader, judge, **options)
    again = _fit(trainer, tmp_path / "again", loader, judge, tmp_path / "whole" / "step=8.ckpt", **options)
    assert set(whole.judged) == {check * n for n in range(24 // check + 1)}
    assert set(again.judged) - {0} == {n for n in whole.judged if n >= 8}
    assert _same(again, whole)


@pytest.mark.filterwarnings("ignore:.*goes on in the middle of an epoch")
def test_the_gradients_of_a_step_that_is_not_finished_are_kept(trainer, tmp_path):
    """Four batches make a step; the checkpoint is from after the sixth. All batches are alike."""

    class Sixth(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "sixth.ckpt")

    def run(*callbacks, ckpt_path=None):
        net = Net()
        torch.manual_seed(9 if ckpt_path else 5)
        t = trainer(PeftCallback(LoRA(r=1), model="body"), *callbacks, accumulate_grad_batches=4)
        t.fit(net, DataLoader(TensorDataset(torch.ones(8, 1))), ckpt_path=ckpt_path, weights_only=True)
        return net

    whole, again = run(Sixth()), run(ckpt_path=tmp_path / "sixth.ckpt")
    assert len(again.seen) == len(whole.seen) - 6
    assert _same(again, whole)
