"""Which checkpoint is kept where no rows validate."""

from __future__ import annotations

import json

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_peft import PeftModule, Selective, TextDataModule
from lightning_peft.callbacks.check_monitor import CheckMonitor

MONITOR = "val/accuracy"


@pytest.fixture
def fit(bert_folder, tmp_path):
    rows = [{"text": ["red ", "blue "][i % 2] * (1 + i % 3), "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def run(*callbacks):
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        watching = [*callbacks, CheckMonitor(MONITOR)]
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=watching, default_root_dir=tmp_path, **quiet)
        module = PeftModule(str(bert_folder), Selective(parameter_types=["head"]))
        trainer.fit(module, TextDataModule(train_files=tmp_path / "texts.jsonl", batch_size=4, validation_fraction=0))
        return trainer

    return run


def test_it_is_that_of_the_last_epoch(fit, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", "best", monitor=MONITOR, mode="max")
    trainer = fit(kept)
    assert (kept.monitor, kept.best_model_path) == (None, str(tmp_path / "kept" / "best.ckpt"))
    assert trainer.global_step == 4
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["best.ckpt"]


@pytest.mark.parametrize(
    "callback",
    [EarlyStopping(MONITOR, mode="max"), ModelCheckpoint(monitor=MONITOR, mode="max", save_top_k=3)],
    ids=["early stopping", "several best ones"],
)
def test_what_needs_a_validation_is_refused_before_training(fit, callback):
    with pytest.raises(ValueError, match=rf"{type(callback).__name__} goes by val/accuracy, but no rows validate"):
        fit(callback)
