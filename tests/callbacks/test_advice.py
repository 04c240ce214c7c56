"""Errors of memory and of data workers keep their type and say what to do."""

from __future__ import annotations

import json
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_peft import LoRA, PeftCallback, PeftModule, TextDataModule, last_checkpoint


class Full(nn.Module):
    """Its third forward finds no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


class Net(L.LightningModule):
    def __init__(self, layer=None) -> None:
        super().__init__()
        self.layer = layer or nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def _note(raised):
    return "\n".join(raised.value.__notes__)


def test_too_little_memory_is_told_with_the_batch_and_what_to_change(trainer):
    t = trainer(PeftCallback(LoRA(r=2), model="layer"), accumulate_grad_batches=2)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        t.fit(Net(Full()), DataLoader(torch.randn(24, 8), batch_size=6))
    said = _note(raised)
    assert "32 trained parameters take 384 B more" in said
    assert "6 rows of 8 tokens" in said
    assert "batch_size=3 with accumulate_grad_batches=4" in said
    assert "fewer trained parameters" in said, "they take more than the base of this one"
    assert "a max_length below 8" in said


def test_peft_module_says_it_too(trainer, tmp_path, bert_folder):
    rows = [{"text": "red " * (1 + i % 5), "label": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Small(PeftModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    data = TextDataModule(train_files=str(tmp_path / "texts.jsonl"), batch_size=4, max_length=16)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer().fit(Small(str(bert_folder), LoRA(r=2)), data)
    assert "1,986 trained parameters" in _note(raised)
    assert "batch_size=2 with accumulate_grad_batches=2" in _note(raised)
    assert "fewer trained" not in _note(raised), "the base takes most"


class Deadly(Dataset):
    """A worker that fetches the row of that number dies as the kernel's memory killer has it."""

    def __init__(self, deadly: int) -> None:
        self.main, self.deadly = os.getpid(), deadly

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.deadly and os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((8,), float(index))


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*goes on in the middle of an epoch")
def test_a_killed_data_worker_ends_the_run_in_a_clear_error_and_the_run_can_be_resumed(trainer, tmp_path):
    def run(deadly, **options):
        keep = ModelCheckpoint(tmp_path / "c", filename="last", every_n_train_steps=1, enable_version_counter=False)
        t = trainer(PeftCallback(LoRA(r=2), model="layer"), keep, enable_checkpointing=True, max_epochs=1)
        t.fit(Net(), DataLoader(Deadly(deadly), batch_size=2, num_workers=1), weights_only=True, **options)
        return t

    torch.manual_seed(0)
    # the second kind where it ends while it hands a batch over
    with pytest.raises((RuntimeError, ConnectionError, EOFError, FileNotFoundError)) as raised:
        run(9)
    assert "take a smaller num_workers" in _note(raised)
    steps = torch.load(last_checkpoint(tmp_path / "c"), weights_only=True)["global_step"]
    assert 0 < steps < 6
    torch.manual_seed(0)
    assert run(-1, ckpt_path="last").global_step == 6
