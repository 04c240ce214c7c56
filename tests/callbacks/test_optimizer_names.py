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

    def __init__(self, arrange, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Sequential(Linear(6, 6), Linear(6, 6))
        self.head = Linear(6, 2)
        self.arrange, self.optimizer = arrange, optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return self.optimizer(self.arrange([p for p in self.parameters() if p.requires_grad]), lr=0.05)


def _callback():
    return PeftCallback(LoRA(r=2), model="backbone", print_plan=False)


def _loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(2, (8,), generator=generator)), 4)  # two steps are an epoch


def _fit(arrange, steps, trainer, resume=None, optimizer=torch.optim.AdamW):
    torch.manual_seed(1)
    module = Net(arrange, optimizer)
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


class Wrapped(torch.optim.Adam):
    """Lays its state out in a way of its own."""

    def state_dict(self):
        return {"fast": super().state_dict(), "slow": [p.detach().clone() for p in self.param_groups[0]["params"]]}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["fast"])


class Counting(torch.optim.Adam):
    """Keeps for all parameters together how many steps there were, and learns less with each."""

    def step(self, closure=None):
        loss = super().step(closure)
        own = self.state["all"]
        own["steps"] = own.get("steps", 0) + 1
        self.param_groups[0]["lr"] = 0.05 / own["steps"]
        return loss


def _moments(run):
    held = run.optimizers[0].param_groups[0]["params"]
    return [run.optimizers[0].state[p]["exp_avg"].tolist() for p in held]


@pytest.mark.parametrize("optimizer", [Wrapped, Counting])
def test_what_an_optimizer_keeps_in_a_way_of_its_own_is_saved_and_comes_back(trainer, tmp_path, optimizer):
    _, run = _fit(_as_they_are, STEPS // 2, trainer, optimizer=optimizer)
    run.save_checkpoint(tmp_path / "middle.ckpt")
    _, again = _fit(_as_they_are, STEPS // 2, trainer, tmp_path / "middle.ckpt", optimizer)
    assert _moments(again) == _moments(run)
    assert any(any(row) for row in _moments(run))
    assert (again.optimizers[0].state["all"] == {"steps": STEPS // 2}) == (optimizer is Counting)


class WithLoose(Net):
    """Two parameters that only its own list holds train before and after the module's."""

    def __init__(self, arrange, optimizer=torch.optim.AdamW):
        super().__init__(arrange, optimizer)
        self.loose = [torch.nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0)]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.loose[0].square() + self.loose[1].pow(3)

    def configure_optimizers(self):
        self.arrange = lambda own: [self.loose[0], *own, self.loose[1]]
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:2 of the parameters that an optimizer trains belong to no module")
def test_the_states_of_parameters_that_belong_to_no_module_come_back_too(trainer, tmp_path):
    run, again = (trainer(_callback(), max_steps=STEPS // 2) for _ in range(2))
    run.fit(WithLoose(_as_they_are), _loader())
    run.save_checkpoint(tmp_path / "middle.ckpt")
    again.fit(WithLoose(_as_they_are), _loader(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert _moments(again) == _moments(run)
    assert len(_moments(run)) == 8


def _edited(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint, checkpoint["lightning_peft"])
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole, record: record.update(optimizers=None), "does not name the parameters of each of its optimizer"),
        (
            lambda whole, record: whole.update(optimizer_states=[]),
            "does not name the parameters of each of its optimiz",
        ),
        (lambda whole, record: record.update(optimizers=[None]), "of AdamW in the checkpoint does not fit the paramet"),
        (lambda whole, record: whole.update(optimizer_states=[{"a": 1}]), "of AdamW in the checkpoint does not fit"),
        (
            lambda whole, record: whole["optimizer_states"][0]["param_groups"][0]["params"].pop(),
            "of AdamW in the checkpoint does not fit the parameters that are named beside it",
        ),
    ],
    ids=["no names", "no states", "no names for one", "another layout", "one less"],
)
def test_states_whose_parameters_are_not_named_are_refused(saved, trainer, change, said):
    with pytest.raises(ValueError, match=said):
        _fit(_as_they_are, STEPS, trainer, resume=_edited(saved[0], change))
