"""A resumed run gives each parameter the optimizer state that it had, by name, or says what differs."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.nn import Linear, Sequential
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback

STEPS = 4


class Net(L.LightningModule):
    """Two layers of one shape, so that a state on the wrong one would fit; the optimizer is the test's."""

    def __init__(self, arrange):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Sequential(Linear(6, 6), Linear(6, 6))
        self.head = Linear(6, 2)
        self.arrange = arrange

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.arrange([p for p in self.parameters() if p.requires_grad]), lr=0.05)


def _callback():
    return PeftCallback(LoRA(r=2), model="backbone", print_plan=False)


def _loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(2, (8,), generator=generator)), 4)  # two steps are an epoch


def _fit(arrange, steps, trainer, resume=None):
    torch.manual_seed(1)
    module = Net(arrange)
    run = trainer(_callback(), max_steps=steps)
    run.fit(module, _loader(), ckpt_path=resume, weights_only=True)
    return module, run


def _as_they_are(parameters):
    return parameters


def _reversed(parameters):
    return parameters[::-1]


def _two_groups(parameters):
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}]


def _without_the_last(parameters):
    return parameters[:-1]


@pytest.fixture
def saved(trainer, tmp_path):
    """A checkpoint in the middle, and what the whole run gives."""
    _, run = _fit(_as_they_are, STEPS // 2, trainer)
    run.save_checkpoint(tmp_path / "middle.ckpt")
    module, _ = _fit(_as_they_are, STEPS, trainer, resume=tmp_path / "middle.ckpt")
    return tmp_path / "middle.ckpt", {n: p.detach().clone() for n, p in module.named_parameters()}


def test_parameters_in_another_order_get_their_own_states(saved, trainer):
    checkpoint, expected = saved
    module, _ = _fit(_reversed, STEPS, trainer, resume=checkpoint)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (_without_the_last, "only in the checkpoint: head.bias"),
        (_two_groups, r"the same 6 parameters are in other groups \(\[6\] in the checkpoint, \[2, 4\] here\)"),
    ],
)
def test_other_parameters_and_groups_are_refused_with_what_differs(saved, trainer, arrange, said):
    with pytest.raises(ValueError, match=said):
        _fit(arrange, STEPS, trainer, resume=saved[0])


def test_states_are_numbered_as_the_module_numbers_its_parameters(saved, trainer):
    """By which strategies that shard read any checkpoint."""
    checkpoint = torch.load(saved[0], weights_only=True)
    names = [n for n, _ in _fit(_as_they_are, 1, trainer)[0].named_parameters()]
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["params"] == list(checkpoint["optimizer_states"][0]["state"])
    assert [[[names[i] for i in group["params"]]]] == checkpoint["lightning_peft"]["optimizers"]
    assert group["params"] != list(range(len(group["params"])))


def test_a_second_fit_without_a_checkpoint_compares_nothing(saved, trainer):
    """What a former fit has loaded is of no concern."""
    module, _ = _fit(_as_they_are, STEPS, trainer, resume=saved[0])
    module.arrange = _two_groups
    trainer(_callback(), max_steps=1).fit(module, _loader())
