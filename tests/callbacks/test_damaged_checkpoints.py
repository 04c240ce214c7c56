"""Checkpoints that are cut short, damaged or another module's: one sentence that names the file and what to do."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PeftCallback, PeftModule, load_from_checkpoint
from lightning_peft.callbacks.randomness import random_state
from lightning_peft.cli.commands import load


class Net(L.LightningModule):
    """One layer, trained to give zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def checkpoint(trainer, tmp_path):
    t = trainer(PeftCallback(LoRA(r=2), model="layer"), max_epochs=1)
    t.fit(Net(), DataLoader(torch.randn(4, 4), batch_size=2))
    t.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


READERS = pytest.mark.parametrize(
    "read",
    [lambda path: load_from_checkpoint(Net, path), PeftModule.load_from_checkpoint, lambda path: load(str(path))],
    ids=["callback", "module", "command"],
)


@READERS
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], r"a.ckpt \(\d+ bytes\) is no checkpoint, or one that is cut short"),
        (lambda whole: b"", r"a.ckpt \(0 bytes\) is no checkpoint, or one that is cut short"),
        (lambda whole: b"hello", r"a.ckpt \(5 bytes\) is no checkpoint"),
        (
            lambda whole: whole.replace(b"data.pkl", b"dota.pkl"),
            r"a.ckpt cannot be read as a checkpoint",
        ),
    ],
    ids=["half", "empty", "text", "without-values"],
)
def test_a_damaged_checkpoint_is_named(checkpoint, read, damage, said):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=said):
        read(checkpoint)


@READERS
def test_what_is_no_checkpoint_of_lightning_is_named(checkpoint, read):
    torch.save({"weight": torch.ones(1)}, checkpoint)
    with pytest.raises(ValueError, match=r"a.ckpt is no checkpoint of Lightning: it has no state_dict"):
        read(checkpoint)


@READERS
def test_objects_are_not_unpickled(checkpoint, read):
    torch.save({"state_dict": {}, "hyper_parameters": Namespace(a=Path("x"))}, checkpoint)
    with pytest.raises(ValueError, match=r"a.ckpt holds an object of argparse.Namespace, but only tensors and"):
        read(checkpoint)


@pytest.mark.parametrize("read", [lambda path: load_from_checkpoint(Net, path), PeftModule.load_from_checkpoint])
def test_a_path_without_a_checkpoint_says_what_is_there(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"missing.ckpt is no file; pass the path of a .ckpt"):
        read(tmp_path / "missing.ckpt")
    with pytest.raises(FileNotFoundError, match="is a folder, but a checkpoint is a file"):
        read(tmp_path)


@pytest.mark.parametrize("read", [PeftModule.load_from_checkpoint, lambda path: load(str(path))])
def test_the_checkpoint_of_ones_own_module_is_told_apart_from_peft_modules(checkpoint, read):
    with pytest.raises(
        ValueError, match=r"a.ckpt was made with PeftCallback on .* by lightning_peft.load_from_checkpoint"
    ):
        read(checkpoint)
    assert isinstance(load_from_checkpoint(Net, checkpoint), Net)


def _set(content, **values):
    content["lightning_peft"].update(values)


def _fill(content, value):
    for name, tensor in content["state_dict"].items():
        content["state_dict"][name] = torch.full_like(tensor, value) if "lora_B" in name else tensor


def _whole(content):
    content["state_dict"] = {n: t.to(torch.int64) for n, t in content["state_dict"].items()}


STATE = random_state()
DAMAGES = {
    "no generators": (lambda c: _set(c, random_state={}), "random_state is none, it may be damaged"),
    "short": (lambda c: _set(c, random_state={**STATE, "torch": torch.zeros(3, dtype=torch.uint8)}), "random_state"),
    "python": (lambda c: _set(c, random_state={**STATE, "python": [3, [1, 2], None]}), "random_state is none"),
    "numpy": (lambda c: _set(c, random_state={**STATE, "numpy": ["MT19937", torch.zeros(2)]}), "random_state is none"),
    "behind": (
        lambda c: _set(c, random_state={**STATE, "numpy": [*STATE["numpy"][:2], 10**6, 0, 0.0]}),
        "the part of numpy is no state of its generator",
    ),
    "list": (lambda c: _set(c, gradients=[1]), "gradients must be a dictionary, but are a list"),
    "unknown": (lambda c: _set(c, gradients={"nope": torch.zeros(1)}), "gradient of 'nope' is none of a parameter"),
    "shape": (lambda c: _set(c, gradients={"layer.weight": torch.zeros(7)}), "gradient of 'layer.weight' is none"),
    "no number": (lambda c: _fill(c, float("nan")), "lora_B holds values that are not finite"),
    "whole": (_whole, r"is of torch.int64, but must be of torch.float32"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_is_named_when_a_run_goes_on(checkpoint, trainer, damage, said):
    content = torch.load(checkpoint, weights_only=True)
    damage(content)
    torch.save(content, checkpoint)
    t = trainer(PeftCallback(LoRA(r=2), model="layer", print_plan=False), max_epochs=2)
    with pytest.raises(ValueError, match=said):
        t.fit(Net(), DataLoader(torch.randn(4, 4), batch_size=2), ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize("version", ["0.0.1", "1.9.5", "x", 2, None])
def test_a_version_that_lightning_cannot_compare_is_named(checkpoint, version):
    content = torch.load(checkpoint, weights_only=True)
    content["pytorch-lightning_version"] = version
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"a.ckpt must be of Lightning 2 or later, but names the version"):
        load_from_checkpoint(Net, checkpoint)
