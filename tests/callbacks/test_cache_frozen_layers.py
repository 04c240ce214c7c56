"""Frozen layers whose output is read from a file from the second epoch on: the same training, without running them."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_peft import ImageDataModule, LadderSideTuning, LoRA, PeftModule, Selective, TextDataModule
from lightning_peft.callbacks.cache_frozen_layers import CacheFrozenLayers

WORDS = ("red", "green", "blue", "small", "large")
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [
        {"text": " ".join([WORDS[i % 5], *[WORDS[i // 5 % 5]] * (i % 7)]), "label": WORDS[i % 3]} for i in range(24)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


class Noted(L.Callback):
    """Every training loss, and how often the first layer's query was computed in each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.runs: list[int] = []

    def on_train_start(self, trainer, pl_module):
        queries = (m for n, m in pl_module.model.named_modules() if n.endswith(("query", "q_proj")))
        next(queries).register_forward_hook(lambda *_: self._run())
        pl_module.model.register_forward_pre_hook(lambda *_: self._begin())

    def _begin(self):
        self.is_step = torch.is_grad_enabled()

    def _run(self):
        if self.is_step:
            self.runs[-1] += 1

    def on_train_epoch_start(self, trainer, pl_module):
        self.runs.append(0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def _fit(folder, method, data, run_folder, *callbacks, config=QUIET, epochs=3, **options):
    L.seed_everything(0, verbose=False)
    module = PeftModule({"name_or_path": str(folder), "config": config}, method, **options)
    noted = Noted()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[noted, *callbacks],
        default_root_dir=run_folder,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(module, data)
    return noted


def _data(files):
    return TextDataModule(train_files=files, validation_files=files, batch_size=5, max_length=16)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (Selective(last_layers=1, learning_rate=1e-2), QUIET),
        (Selective(parameter_types=["head"], learning_rate=1e-2), QUIET),
        (LoRA(r=2, layers_to_transform=[1], lora_dropout=0.2, learning_rate=1e-2), QUIET),
        (LadderSideTuning(reduction_factor=4, dropout=0.2), QUIET),
    ],
    ids=["last layers", "head", "LoRA in the last layer", "ladder"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_and_the_frozen_layers_run_once(method, config, precision, bert_folder, texts, tmp_path):
    expected = _fit(bert_folder, method, _data(texts), tmp_path, config=config)
    found = _fit(bert_folder, method, _data(texts), tmp_path, CacheFrozenLayers(), config=config)
    assert expected.runs == [5, 5, 5]
    assert found.runs == [5, 0, 0]
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=1e-6)
    assert expected.losses[:5] != pytest.approx(expected.losses[-5:], rel=1e-3), "it is trained"
    assert not list(tmp_path.glob("frozen_layers*"))


def test_dropout_above_the_frozen_layers_draws_the_same_numbers(bert_folder, texts, tmp_path):
    config = {**QUIET, "classifier_dropout": 0.3}
    runs = [
        _fit(bert_folder, Selective(last_layers=1), _data(texts), tmp_path, *callbacks, config=config)
        for callbacks in ([], [CacheFrozenLayers()])
    ]
    assert runs[1].runs == [5, 0, 0]
    torch.testing.assert_close(torch.tensor(runs[1].losses), torch.tensor(runs[0].losses), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "config", "why"),
    [
        (Selective(last_layers=1), {}, "draw random numbers; set their dropout to 0"),
        (LoRA(r=2), QUIET, "the first layer trains"),
        (Selective(parameter_types=["embedding"]), QUIET, "the first layer trains, or what comes before it"),
        (LadderSideTuning(reduction_factor=4), {}, "draw random numbers; set their dropout to 0"),
    ],
)
def test_what_cannot_be_kept_is_computed_and_said(method, config, why, bert_folder, texts, tmp_path):
    with pytest.warns(UserWarning, match=f"CacheFrozenLayers keeps nothing: .*{why}"):
        found = _fit(bert_folder, method, _data(texts), tmp_path, CacheFrozenLayers(), config=config)
    expected = _fit(bert_folder, method, _data(texts), tmp_path, config=config)
    assert found.losses == expected.losses
    assert found.runs == expected.runs
    assert not list(tmp_path.glob("frozen_layers*"))


class Thaw(L.Callback):
    """Lets the first layer rest until the third epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        for name, parameter in pl_module.model.named_parameters():
            if "layer.0." in name:
                parameter.requires_grad_(trainer.current_epoch > 1)


def test_layers_that_begin_to_train_are_run_again(bert_folder, texts, tmp_path):
    method = Selective(last_layers=2, learning_rate=1e-2)
    expected = _fit(bert_folder, method, _data(texts), tmp_path, Thaw(), epochs=4)
    with pytest.warns(UserWarning, match="the first layer trains"):
        found = _fit(bert_folder, method, _data(texts), tmp_path, Thaw(), CacheFrozenLayers(), epochs=4)
    assert found.runs == [5, 0, 5, 5]
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-4, atol=1e-5)


def test_rows_beyond_the_files_size_are_computed_each_time(bert_folder, texts, tmp_path):
    with pytest.warns(UserWarning, match="is full .*raise max_gb"):
        found = _fit(bert_folder, Selective(last_layers=1), _data(texts), tmp_path, CacheFrozenLayers(max_gb=1e-6))
    assert found.runs == [5, 5, 5]


def test_a_file_that_is_kept_serves_the_next_run_on_the_same_base(bert_folder, texts, tmp_path):
    runs = [
        _fit(bert_folder, Selective(last_layers=1), _data(texts), tmp_path, CacheFrozenLayers(keep=True, max_gb=0.01))
        for _ in range(2)
    ]
    # the first batch of the second run is computed, to see how much is frozen
    assert [r.runs for r in runs] == [[5, 0, 0], [1, 0, 0]]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert (tmp_path / "frozen_layers.bin").stat().st_size < 1e6
    assert (tmp_path / "frozen_layers.json").is_file()


def test_another_head_that_reads_every_state_is_told_by_its_one_number(bert_folder, texts, tmp_path):
    class SumsAll(L.Callback):
        """A head that reads padding too, which no file holds."""

        def on_fit_start(self, trainer, pl_module):
            model = pl_module.model
            summed = model.bert.pooler.forward
            model.bert.pooler.forward = lambda hidden: summed(hidden) + hidden.sum(1)

    path = Path(texts)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": r["text"], "label": len(r["text"]) / 10}) + "\n" for r in rows))
    task = {"name": "text_classification", "problem_type": "regression"}
    with pytest.warns(UserWarning, match="read more than the last frozen layer's output"):
        _fit(bert_folder, Selective(last_layers=1), _data(texts), tmp_path, SumsAll(), CacheFrozenLayers(), task=task)


def test_images_are_rows_without_a_mask(vit_folder, draw, tmp_path):
    folder = draw(each=8)
    runs = []
    for callbacks in ([], [CacheFrozenLayers()]):
        data = ImageDataModule(train_files=folder, validation_files=folder, batch_size=5)
        runs.append(_fit(vit_folder, Selective(last_layers=1), data, tmp_path, *callbacks, task="image_classification"))
    assert runs[1].runs[1:] == [0, 0]
    torch.testing.assert_close(torch.tensor(runs[1].losses), torch.tensor(runs[0].losses), rtol=1e-5, atol=1e-6)


def test_a_run_that_fails_leaves_no_file(bert_folder, texts, tmp_path):
    class Fails(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert list(tmp_path.glob("frozen_layers*"))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        _fit(bert_folder, Selective(last_layers=1), _data(texts), tmp_path, CacheFrozenLayers(), Fails())
    assert not list(tmp_path.glob("frozen_layers*"))


def test_packed_batches_and_a_size_of_nothing_are_refused(llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"max_gb must be above 0, but got 0"):
        CacheFrozenLayers(max_gb=0)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": w, "completion": f" {w}"}) + "\n" for w in WORDS))
    options = {"task": "sft", "config": {}}
    with pytest.raises(ValueError, match=r"packs the rows of a batch; set task.packing=false"):
        _fit(llama_folder, Selective(last_layers=1), _data(str(path)), tmp_path, CacheFrozenLayers(), **options)


def test_a_language_model_without_packing_starts_at_its_first_trained_layer(llama_folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {WORDS[i % 5]}", "completion": f" {WORDS[i % 5]}" * (1 + i % 4)} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {"name": "sft", "packing": False}
    method = LoRA(r=2, layers_to_transform=[1], learning_rate=1e-2)
    runs = [
        _fit(llama_folder, method, _data(str(path)), tmp_path, *callbacks, task=task, config={})
        for callbacks in ([], [CacheFrozenLayers()])
    ]
    assert len(runs[0].losses) == 15
    torch.testing.assert_close(torch.tensor(runs[1].losses), torch.tensor(runs[0].losses), rtol=1e-5, atol=1e-6)
