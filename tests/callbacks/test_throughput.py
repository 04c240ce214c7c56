"""Learning rate, tokens a second and supervised tokens reach loggers and progress bars."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import LoRA, PeftModule, TextDataModule
from lightning_peft.callbacks.throughput import Throughput, token_counts


def test_padding_and_what_the_loss_leaves_out_is_not_counted():
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([[-100, 4, -100], [-100, 5, 6]]),
    }
    assert [int(n) for n in token_counts(batch)] == [5, 3]
    pair = {"chosen_attention_mask": batch["attention_mask"], "rejected_attention_mask": batch["attention_mask"]}
    assert [int(n) for n in token_counts(pair)] == [10, 0]
    assert [int(n) for n in token_counts({**batch, "labels": torch.tensor([1, 0])})] == [5, 0]
    assert token_counts(torch.ones(3)) == (0, 0)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_language_models_run_logs_them_and_goes_on_counting_when_resumed(llama_folder, tmp_path, accumulated):
    rows = [{"prompt": f"say {i} ", "completion": "red blue"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def run(epochs, path=None):
        module = PeftModule(str(llama_folder), LoRA(r=2), "sft", {"lr": 1e-2}, {"name": "constant"})
        path_of_rows = tmp_path / "pairs.jsonl"
        data = TextDataModule(train_files=path_of_rows, validation_files=path_of_rows, batch_size=4)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=accumulated,
            log_every_n_steps=1,
            callbacks=[Throughput()],
            logger=CSVLogger(tmp_path / f"{epochs}", "", ""),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        features = data._features["train"]
        supervised = sum(int((torch.as_tensor(f["labels"]) != -100).sum()) for f in features)
        return trainer.progress_bar_metrics, supervised

    shown, supervised = run(1)
    assert shown["lr"] == pytest.approx(1e-2)
    assert shown["train/tokens_per_second"] > 0
    assert shown["train/supervised_tokens"] == supervised
    assert run(2, tmp_path / "1.ckpt")[0]["train/supervised_tokens"] == 2 * supervised
    header = (tmp_path / "1" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr", "train/tokens_per_second", "train/supervised_tokens"} <= set(header)


def test_the_time_of_a_validation_is_none_of_the_training(monkeypatch):
    class Logged:
        def log_dict(self, values, **options):
            self.values = values

    class Trainer:
        global_step, log_every_n_steps, optimizers = 0, 1, ()

    clock = iter([0.0, 2.0, 7.0, 9.0])  # begin, validation, next batch, its end
    monkeypatch.setattr("lightning_peft.callbacks.throughput.time.perf_counter", lambda: next(clock))
    callback, trainer, module = Throughput(), Trainer(), Logged()
    batch = {"attention_mask": torch.ones(2, 10, dtype=torch.long)}
    callback.on_train_start(trainer, module)
    callback.on_validation_start(trainer, module)
    callback.on_train_batch_start(trainer, module, batch, 0)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert module.values["train/tokens_per_second"] == 20 / 4
