"""A checkpoint of a version that did not know an option yet: what is not said there is the default."""

from __future__ import annotations

from dataclasses import MISSING, fields

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import IA3, LoHa, LoRA, PeftCallback, PeftModule, load_from_checkpoint

METHODS = {
    "LoRA": LoRA(r=2, lora_alpha=3, target_modules=["layer"]),
    "IA3": IA3(target_modules=["layer"], feedforward_modules=[]),
    "LoHa": LoHa(r=2, target_modules=["layer"]),
}


class Net(L.LightningModule):
    """One layer below a root that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential()
        self.backbone.add_module("layer", nn.Linear(4, 4))

    def training_step(self, batch, batch_idx):
        return self.backbone(batch).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def train_dataloader(self):
        return DataLoader(torch.arange(16.0).view(4, 4), batch_size=2)

    test_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def _forget(record, method):
    """Leaves what has a default, and the value of it, out of a record; as if it had come later."""
    for option in fields(method):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if default is not MISSING and record[option.name] == default:
            del record[option.name]


@pytest.fixture(params=METHODS)
def older(request, trainer, tmp_path):
    """A method, and a checkpoint that does not name its defaults, with the module that it is of."""
    method, net = METHODS[request.param], Net()
    t = trainer(PeftCallback(method, "backbone", print_plan=False), max_epochs=1)
    t.fit(net)
    t.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    before = len(content["lightning_peft"]["methods"]["default"])
    _forget(content["lightning_peft"]["methods"]["default"], method)
    assert len(content["lightning_peft"]["methods"]["default"]) < before - 1
    torch.save(content, tmp_path / "a.ckpt")
    return method, net, tmp_path / "a.ckpt"


def test_it_loads(older):
    _, net, path = older
    x = torch.randn(3, 4)
    assert torch.equal(load_from_checkpoint(Net, path).backbone(x), net.backbone(x))


def test_it_resumes_and_is_tested(older, trainer):
    method, net, path = older
    again = Net()
    more = trainer(PeftCallback(method, "backbone", print_plan=False), max_epochs=3)
    more.fit(again, ckpt_path=path, weights_only=True)
    assert more.global_step == 6
    judge = trainer(PeftCallback(method, "backbone", print_plan=False))
    (found,) = judge.test(Net(), ckpt_path=path, weights_only=True, verbose=False)
    (expected,) = trainer().test(net, verbose=False)
    assert found == expected


def test_another_value_than_the_default_is_still_another_method(older, trainer):
    _, _, path = older
    other = LoRA(r=2, lora_alpha=3, target_modules=["layer"], use_rslora=True)
    with pytest.raises(ValueError, match="the checkpoint was trained by another method: "):
        trainer(PeftCallback(other, "backbone"), max_epochs=2).fit(Net(), ckpt_path=path, weights_only=True)


def test_a_peft_modules_loads(trainer, tmp_path, bert_folder):
    module = PeftModule(str(bert_folder), LoRA(r=2), {"name": "text_classification", "labels": ["a", "b"]})
    module.configure_model()
    content = {"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}
    module.on_save_checkpoint(content)
    content["hyper_parameters"] = {k: dict(v) if isinstance(v, dict) else v for k, v in module.hparams.items()}
    for record in (content["hyper_parameters"]["method"], content["lightning_peft"]["methods"]["default"]):
        _forget(record, LoRA(r=2))
    torch.save(content, tmp_path / "b.ckpt")
    assert PeftModule.load_from_checkpoint(tmp_path / "b.ckpt").method == LoRA(r=2)
