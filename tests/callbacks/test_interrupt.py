"""What a person sees who interrupts a run in a terminal."""

from __future__ import annotations

import re
import signal
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks.interrupt import SaveOnInterrupt


class Interrupted(L.LightningModule):
    """Ctrl-C in its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    heard = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, heard)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("words", [None, ["method=lora", "data.columns={text: a b}", "ckpt_path=old.ckpt"]])
def test_the_command_to_go_on_is_one_line_below_the_stopped_bar(narrow_terminal, monkeypatch, capsys, tmp_path, words):
    monkeypatch.setattr(sys, "argv", ["env/lightning-peft", "-m", "method=lora,bitfit", "hydra.run.dir=a"])
    # the bar that a command appends comes after the callback that saves
    callbacks = [SaveOnInterrupt(str(tmp_path), words), RichProgressBar()]
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **options)
    with pytest.raises(SystemExit):
        trainer.fit(Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2))))
    said = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().out)
    given = "-m method=lora,bitfit" if words is None else "method=lora 'data.columns={text: a b}'"
    command = f"Go on with:  env/lightning-peft {given} ckpt_path={tmp_path}/interrupted.ckpt\n"
    assert command in said
    assert not said[said.index(command) + len(command) :].strip(), "nothing is drawn below it"
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 2
