"""What a run costs, as numbers in its folder."""

from __future__ import annotations

import json
import time

import lightning as L
import torch
from torch import nn

from lightning_peft.callbacks.cost import RecordCost

STEP = 0.02  # seconds that a batch takes at least
VALIDATION = 0.3


class Slow(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(STEP)
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(VALIDATION)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 2), batch_size=1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(1, 2), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def cost_of(folder, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[RecordCost(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(Slow())
    return json.loads((folder / "cost.json").read_text()) if (folder / "cost.json").exists() else None


def test_a_steps_time_is_its_batches_without_the_validations_between_them(tmp_path):
    cost = cost_of(tmp_path, val_check_interval=2)
    assert STEP <= cost["step_seconds"] < VALIDATION
    assert (cost["steps"], cost["peak_bytes"]) == (12, None)


def test_a_step_of_accumulated_batches_takes_as_many_times_as_long(tmp_path):
    cost = cost_of(tmp_path, accumulate_grad_batches=3, limit_val_batches=0)
    assert cost["step_seconds"] >= 3 * STEP
    assert cost["steps"] == 4


def test_what_the_optimizer_takes_is_in_a_step_of_accumulated_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(Slow, "on_before_optimizer_step", lambda self, optimizer: time.sleep(VALIDATION))
    assert cost_of(tmp_path, accumulate_grad_batches=3, limit_val_batches=0)["step_seconds"] >= VALIDATION + 3 * STEP


def test_a_run_that_goes_on_behind_its_last_step_leaves_its_cost(tmp_path):
    (tmp_path / "cost.json").write_text('{"step_seconds": 1.5}')
    assert cost_of(tmp_path, limit_train_batches=1, limit_val_batches=0) == {"step_seconds": 1.5}


def test_a_single_batch_has_no_time_between_two(tmp_path):
    assert cost_of(tmp_path, limit_train_batches=1, limit_val_batches=0)["step_seconds"] is None


def test_a_trial_of_the_code_leaves_no_cost(tmp_path):
    assert cost_of(tmp_path, fast_dev_run=True) is None
