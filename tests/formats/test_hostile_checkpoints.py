"""A checkpoint from elsewhere: it loads right or is refused by name; nothing it says runs, or turns a check off."""

from __future__ import annotations

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PeftCallback, PeftModule, load_from_checkpoint

PARSER = "lightning.pytorch.cli.instantiate_module"
TASK = {"name": "text_classification", "labels": ["a", "b"]}


class Part:
    """What a command line makes of a class's name."""


class Net(L.LightningModule):
    """One layer, and arguments of the kinds that a command line fills."""

    def __init__(self, extra: Part | None = None, width: int = 4, name: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, width)
        self.extra = extra

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 4), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def changed(trainer, tmp_path):
    """A checkpoint of `Net` in which something is changed."""

    def make(by):
        t = trainer(PeftCallback(LoRA(r=2), "layer", print_plan=False), max_epochs=1)
        t.fit(Net())
        t.save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        by(content)
        torch.save(content, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return make


@pytest.fixture
def changed_module(trainer, tmp_path, bert_folder):
    """A checkpoint of a PeftModule in which something is changed."""

    def make(by):
        module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
        module.configure_model()
        content = {"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}
        module.on_save_checkpoint(content)
        content["hyper_parameters"] = dict(module.hparams)
        by(content)
        torch.save(content, tmp_path / "b.ckpt")
        return tmp_path / "b.ckpt"

    return make


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A class in a module that can be imported and notes that it was; and the note's path."""
    note = tmp_path / "imported"
    text = f"open({str(note)!r}, 'w')\nclass Evil: pass\n"
    (tmp_path / "trapmodule.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"class_path": "trapmodule.Evil"}, note
    sys.modules.pop("trapmodule", None)


def test_a_class_that_a_checkpoint_names_is_neither_imported_nor_made(changed, trap):
    named, note = trap
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": named}))
    with pytest.raises(ValueError, match=r"a.ckpt names the class 'trapmodule.Evil' for 'extra', .*, extra=\.\.\.\)"):
        load_from_checkpoint(Net, path)
    assert not note.exists()
    # what the user gives stands above it
    assert isinstance(load_from_checkpoint(Net, path, extra=Part()).extra, Part)
    assert not note.exists()


def test_no_spelling_of_a_class_is_imported(changed, trap):
    named, note = trap
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": [{"a": named}]}))
    with pytest.raises(ValueError, match=r"a.ckpt names the class 'trapmodule.Evil' for 'extra'"):
        load_from_checkpoint(Net, path)
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": "trapmodule.Evil"}))
    assert load_from_checkpoint(Net, path).extra == "trapmodule.Evil"
    assert not note.exists()


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_options_of_former_versions_are_refused(changed, changed_module, trap, key):
    named, note = trap
    said = {key: {"_instantiator": PARSER, "extra": named}}
    with pytest.raises(ValueError, match=f"a.ckpt has options of the module under '{key}', but they are read from"):
        load_from_checkpoint(Net, changed(lambda c: c.update(said)))

    def unchecked(content):
        content[key] = {"check_base": False}
        content["lightning_peft"]["base"]["fingerprint"] = "0" * 16

    with pytest.raises(ValueError, match=f"b.ckpt has options of the module under '{key}', but they are read from"):
        PeftModule.load_from_checkpoint(changed_module(unchecked))
    assert not note.exists()


def test_the_class_of_the_options_is_not_the_files_choice(changed):
    with pytest.raises(ValueError, match=r"a.ckpt has options of the module under 'hparams_type'"):
        load_from_checkpoint(Net, changed(lambda c: c.update(hparams_type=torch.device)))


@pytest.mark.parametrize("option", ["method", "model", "task"])
def test_a_peft_module_is_built_without_a_parser(changed_module, trap, option):
    named, note = trap
    path = changed_module(lambda c: c["hyper_parameters"].update({"_instantiator": PARSER, option: named}))
    with pytest.raises(ValueError, match=f"b.ckpt names the class 'trapmodule.Evil' for '{option}'"):
        PeftModule.load_from_checkpoint(path)
    path = changed_module(lambda c: c["hyper_parameters"].update({"_instantiator": PARSER}))
    assert isinstance(PeftModule.load_from_checkpoint(path), PeftModule)
    assert not note.exists()


@pytest.mark.parametrize("name", ["check_base", "generation"])
def test_all_options_cannot_be_one_of_them(changed_module, name):
    path = changed_module(lambda c: c.update(hparams_name=name))
    with pytest.raises(ValueError, match=f"b.ckpt gives all its options to '{name}', which is one of them"):
        PeftModule.load_from_checkpoint(path)


def test_a_checkpoint_of_lightnings_command_line_loads_with_what_it_built_given_again(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2}}
    callback = {"class_path": "lightning_peft.PeftCallback", "init_args": {"method": method, "model": "layer"}}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"callbacks": [callback], "accelerator": "cpu", "max_epochs": 1, **quiet}
    for extra in (None, {"class_path": f"{__name__}.Part"}):
        args = {"seed_everything": 0, "trainer": options, "model": {"width": 3, "extra": extra}}
        cli = LightningCLI(Net, run=False, args=args, save_config_callback=None)
        cli.trainer.fit(cli.model)
        cli.trainer.save_checkpoint(tmp_path / "c.ckpt")
        assert torch.load(tmp_path / "c.ckpt", weights_only=True)["hyper_parameters"]["_instantiator"] == PARSER
        given = {} if extra is None else {"extra": cli.model.extra}
        again = load_from_checkpoint(Net, tmp_path / "c.ckpt", **given)
        x = torch.ones(2, 4)
        assert torch.equal(again.layer(x), cli.model.layer(x))
