"""The progress bar says what a run does, in few characters."""

from __future__ import annotations

import json

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.callbacks.progress_bar import ProgressBar, said
from lightning_peft.callbacks.throughput import Throughput


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2.34567, "2.346"), (1.5e-5, "1.5e-05"), (22731.08, "22,731"), (3848.0, "3,848"), (0.0, "0"), ("a", "a")],
)
def test_a_metric_has_as_many_digits_as_say_something(value, expected):
    assert said(value) == expected


def test_a_bar_has_the_loss_the_rate_and_the_speed_under_short_names(llama_folder, tmp_path, capsys):
    rows = [{"prompt": f"say {i} ", "completion": "red"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    bar = ProgressBar()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[Throughput(), bar],
        logger=CSVLogger(tmp_path, "", "run"),
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = PeftModule(str(llama_folder), LoRA(r=2), "sft", {"lr": 1e-2}, {"name": "constant"})
    trainer.fit(module, TextDataModule(train_files=str(tmp_path / "pairs.jsonl"), batch_size=4, max_length=24))
    shown = bar.get_metrics(trainer, module)
    assert {"loss", "lr", "tokens/s", "supervised", "val/loss"} <= set(shown)
    assert "v_num" not in shown
    assert shown["lr"] == "0.01"
    assert "loss" in capsys.readouterr().out
