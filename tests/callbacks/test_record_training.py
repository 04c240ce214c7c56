"""What is noted of a training goes where the adapter goes, and onto its card."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft import LoRA, PeftCallback, PeftModule, TextDataModule, load_adapter
from lightning_peft.callbacks.show_data import ShowData
from lightning_peft.formats.folder import read_folder

# of tiny splits a metric may be a whole number
pytestmark = pytest.mark.filterwarnings("ignore:.*the value needs to be floating to be reduced")


@pytest.fixture
def data(tmp_path):
    rows = [{"text": ["red ", "blue "][i % 2] * (1 + i % 3), "label": ["a|b", "c"][i % 2]} for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(**options):
        return TextDataModule(train_files=tmp_path / "texts.jsonl", batch_size=4, max_length=8, **options)

    return make


@pytest.fixture
def module(bert_folder):
    def make(**options):
        torch.manual_seed(3)
        return PeftModule(str(bert_folder), LoRA(r=2), "text_classification", **options)

    return make


def _losses(adapter):
    record = adapter.tree.record.training
    record.settle()
    return record.losses


def test_the_card_tells_settings_data_and_metrics_of_the_run(module, data, trainer, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    it = module(optimizer={"lr": 0.01, "weight_decay": 0.1}, scheduler={"name": "cosine"})
    run = trainer(accumulate_grad_batches=2, gradient_clip_val=1.0)
    run.fit(it, data())
    card = ModelCard.load(it.save_adapter(tmp_path / "out") / "README.md")
    for line in (
        "| optimizer | AdamW |",
        "| learning rate | 0.01 |",
        "| schedule | cosine, 6% warm-up |",
        "| weight decay | 0.1 |",
        "| batch size | 8 (4 in a batch x 2 accumulated) |",
        "| gradient clipping | 1 (norm) |",
        "| precision | 32-true |",
        f"| steps | {run.global_step} (2 epochs) |",
        "From `texts.jsonl`, cut to 8 tokens.",
        r"| a\|b | ",
        f"- transformers {card.text.partition('- transformers ')[2].split()[0]}",
    ):
        assert line in card.text
    assert "seed" not in card.text
    assert [(step, batches) for step, _, batches in _losses(it.adapter)] == [(step, 2) for step in range(1, 5)]
    rows = {"train": 16, "validation": 4}
    assert all(f"| {split} | {count} | " in card.text for split, count in rows.items())
    assert str(tmp_path) not in str(card)
    reached = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert reached["accuracy"] == pytest.approx(run.callback_metrics["val/accuracy"].item())
    assert {(r.dataset_split, r.dataset_name, r.task_type) for r in card.data.eval_results} == {
        ("validation", "texts.jsonl", "text-classification")
    }
    assert f"| validation loss | {run.callback_metrics['val/loss'].item():.4g} |" in card.text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "](curves.png)" in card.text


def test_a_resumed_run_keeps_the_curve_that_it_had(module, data, trainer, tmp_path):
    whole = module(scheduler={"name": "constant", "warmup": 0})
    trainer(max_epochs=4).fit(whole, data())
    expected = _losses(whole.adapter)
    assert [p[0] for p in expected] == list(range(1, 17))

    first = module(scheduler={"name": "constant", "warmup": 0})
    run = trainer(max_epochs=2)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = module(scheduler={"name": "constant", "warmup": 0})
    trainer(max_epochs=4).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert _losses(second.adapter) == expected
    record = second.adapter.tree.record.training
    assert record.metrics == whole.adapter.tree.record.training.metrics
    assert (record.step, record.earlier) == (16, 0)


def test_the_weights_of_a_checkpoint_have_the_numbers_of_their_step(module, data, trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1)
    it = module()
    trainer(keep, ShowData(), enable_checkpointing=True).fit(it, data())
    losses = [value for _, value in it.adapter.tree.record.training.metrics["val/loss"]]
    for step, loss in zip((4, 8), losses, strict=True):
        loaded = PeftModule.load_from_checkpoint(tmp_path / "kept" / f"step={step}.ckpt")
        record = loaded.adapter.tree.record.training
        assert (record.step, record.reached["val/loss"], record.last_step) == (step, loss, step)
        text = (loaded.save_adapter(tmp_path / str(step)) / "README.md").read_text()
        assert f"| steps | {step} ({'1 epoch' if step == 4 else '2 epochs'}) |" in text
        assert "From `texts.jsonl`" in text


def test_the_notes_are_in_the_folder_and_on_the_cards_of_what_is_made_of_it(module, data, trainer, tmp_path):
    it = module()
    trainer().fit(it, data())
    folder = it.save_adapter(tmp_path / "out")
    assert read_folder(folder).training == it.adapter.tree.record.training
    merged = PeftModule.from_adapter(folder).adapter.save_merged(tmp_path / "merged")
    card, first = (ModelCard.load(f / "README.md") for f in (merged, folder))
    assert card.data.eval_results == first.data.eval_results
    assert card.text.partition("## Metrics")[2] == first.text.partition("## Metrics")[2]
    assert (merged / "curves.png").read_bytes() == (folder / "curves.png").read_bytes()


def test_what_was_trained_before_is_counted(module, data, trainer, tmp_path):
    it = module()
    trainer().fit(it, data())
    trainer(max_epochs=1).fit(it, data())
    record = it.adapter.tree.record.training
    assert (record.earlier, record.step) == (8, 4)
    text = (it.save_adapter(tmp_path / "out") / "README.md").read_text()
    assert "The adapter had been trained for 8 steps before." in text


def test_a_test_run_is_on_the_card(module, data, trainer, tmp_path):
    it = module()
    run = trainer()
    run.fit(it, data())
    (found,) = run.test(it, data(test_files=tmp_path / "texts.jsonl"), verbose=False)
    card = ModelCard.load(it.save_adapter(tmp_path / "out") / "README.md")
    assert f"| test accuracy | {found['test/accuracy']:.4g} |" in card.text
    assert {r.dataset_split for r in card.data.eval_results} == {"validation", "test"}


class _Own(L.LightningModule):
    """A module of somebody's own, which logs under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        self.log("mine", 3.0)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("error_now", self.net(batch[0]).abs().mean())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _rows():
    return DataLoader(TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))), batch_size=2)


def test_a_module_of_ones_own_gets_a_card_with_what_it_returned_and_logged(trainer, tmp_path):
    callback = PeftCallback(LoRA(r=2), print_plan=False)
    it = _Own()
    run = trainer(callback, enable_checkpointing=True)
    run.fit(it, _rows(), _rows())
    folder = callback.adapter(it).save(tmp_path / "out")
    text = (folder / "README.md").read_text()
    reached = run.callback_metrics["error_now"].item()
    for line in ("| optimizer | SGD |", "| batch size | 2 |", f"| error_now | {reached:.4g} |", "](curves.png)"):
        assert line in text
    assert "mine" not in text
    assert "## Data" not in text
    assert len(_losses(callback.adapter(it))) == 8
    again = lightning_peft.load_from_checkpoint(_Own, run.checkpoint_callback.best_model_path)
    assert callback.adapter(again).tree.record.training == callback.adapter(it).tree.record.training
    fresh = _Own()
    assert load_adapter(fresh, folder).tree.record.training == callback.adapter(it).tree.record.training


def test_a_loss_that_is_not_finite_leaves_no_mark(trainer, tmp_path):
    class Broken(_Own):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            # the gradients stay what they are
            return loss + float("inf") if batch_idx == 1 else loss

    callback = PeftCallback(LoRA(r=2), print_plan=False)
    it = Broken()
    trainer(callback, max_epochs=1).fit(it, _rows())
    assert [p[0] for p in _losses(callback.adapter(it))] == [1, 3, 4]
