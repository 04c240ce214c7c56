"""What training says of a step's memory before it loads the model."""

from __future__ import annotations

import gc
import json
import re
import shutil
import warnings

import lightning as L
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lightning_peft import ImageDataModule, LoRA, PeftModule, PromptTuning, TextDataModule
from lightning_peft.analysis.device_memory import machine_memory, memory_for_a_step
from lightning_peft.analysis.gpus import RESERVE
from lightning_peft.analysis.live_bytes import LiveBytes
from lightning_peft.callbacks.forecast import Forecast


class Peak(L.Callback):
    """The most bytes of live tensors in any step but the first."""

    def on_train_start(self, trainer, pl_module):
        self.live, self.most = LiveBytes(), 0
        self.live.watch([*pl_module.parameters(), *pl_module.model.buffers()])
        self.live.__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.live.restart()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.most = max(self.most, self.live.peak if trainer.global_step > 1 else 0)

    def on_train_end(self, trainer, pl_module):
        self.live.__exit__(None, None, None)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "red " * (30 + i % 31), "label": "odd" if i % 2 else "even"} for i in range(60)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def make(bert_folder, texts):
    """A module and its data, of rows of up to 62 tokens."""

    def given(folder=bert_folder, method=None, batch_size=8, task="text_classification", **options):
        module = PeftModule(folder, method or LoRA(r=2, lora_dropout=0.1), task, **options)
        return module, TextDataModule(train_files=texts, batch_size=batch_size, validation_fraction=0.0)

    return given


@pytest.fixture
def without_weights(bert_folder, tmp_path):
    shutil.copytree(bert_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(tmp_path / "base")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_step_takes_what_was_said_of_it(make, trainer, tmp_path, capsys, precision):
    peak = Peak()
    trainer(Forecast(tmp_path / "run"), peak, precision=precision, max_epochs=1).fit(*make())
    told = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert told["peak"] == pytest.approx(peak.most, rel=0.01)
    assert (told["schema"], told["rows"], told["tokens"], told["precision"]) == (1, 8, 62, precision)
    said = capsys.readouterr().out
    assert re.match(r"A step of 8 x 62 tokens takes \d+\.\d MB of the \d+\.\d GB of this machine\n  weights ", said)
    assert said.index("A step") < said.index("LoRA: trains")
    assert max(map(len, said.splitlines()[:2])) <= 80


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_of_a_language_model_takes_what_was_said_of_it(
    llama_folder, uneven_answers, trainer, tmp_path, capsys, packing
):
    peak, module = Peak(), PeftModule(llama_folder, LoRA(r=2), {"name": "sft", "packing": packing})
    data = TextDataModule(train_files=uneven_answers, batch_size=12, validation_fraction=0.0)
    trainer(Forecast(tmp_path / "run"), peak, max_epochs=2).fit(module, data)
    told = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert told["peak"] == pytest.approx(peak.most, rel=0.01)
    # weights are most of it, so the rest is looked at by itself
    assert told["peak"] - told["weights"] == pytest.approx(peak.most - told["weights"], rel=0.02)
    size = "12 rows packed to 144 tokens" if packing else "12 x 17 tokens"
    assert f"A step of {size} takes" in capsys.readouterr().out


def test_rows_that_are_padded_after_all_are_counted_again(llama_folder, uneven_answers, trainer, tmp_path, capsys):
    module = PeftModule(llama_folder, PromptTuning(num_virtual_tokens=4), "sft")
    data = TextDataModule(train_files=uneven_answers, batch_size=12, validation_fraction=0.0)
    trainer(Forecast(tmp_path / "run"), max_epochs=1).fit(module, data)
    said = capsys.readouterr().out
    assert said.index("12 rows packed to 144 tokens") < said.index("A step of 12 x 17 tokens")
    assert json.loads((tmp_path / "run" / "forecast.json").read_text())["tokens"] == 17


def test_images_have_a_size_of_their_own(vit_folder, draw, trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "tables")
    module = PeftModule(vit_folder, LoRA(r=2), "image_classification")
    data = ImageDataModule(source=str(draw()), batch_size=6, validation_fraction=0.0)
    trainer(Forecast(tmp_path / "run"), max_epochs=1).fit(module, data)
    told = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert (told["rows"], told["tokens"]) == (6, None)
    assert "A step of 6 images takes" in capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 2])
def test_a_machine_has_what_its_control_group_may_take(tmp_path, version):
    groups, own = tmp_path / "groups", tmp_path / "own"
    root, name = (groups / "memory", "memory.limit_in_bytes") if version == 1 else (groups, "memory.max")
    (root / "job" / "step").mkdir(parents=True)
    own.write_text("4:cpu,memory:/job/step\n1:cpu:/\n0::/\n" if version == 1 else "0::/job/step\n")
    everything = machine_memory(own, groups)
    assert everything > 10**8
    (root / name).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert machine_memory(own, groups) == everything
    (root / "job" / name).write_text("100000000\n")
    assert machine_memory(own, groups) == 10**8
    assert machine_memory(tmp_path / "none", groups) == everything


@pytest.mark.parametrize("task", ["text_classification", "sft"])
def test_training_is_to_the_bit_what_it_is_without(make, llama_folder, uneven_answers, trainer, task):
    def trained(*callbacks):
        torch.manual_seed(0)
        module, data = make()
        if task == "sft":
            module = PeftModule(llama_folder, LoRA(r=2, lora_dropout=0.1), task)
            data = TextDataModule(train_files=uneven_answers, batch_size=8)
        with warnings.catch_warnings(record=True) as warned:
            trainer(*callbacks, max_epochs=1).fit(module, data)
        return module.adapter.tree.state_dict(), {str(w.message) for w in warned}

    (with_it, warned), (without, expected) = trained(Forecast()), trained()
    assert all(torch.equal(t, with_it[n]) for n, t in without.items())
    assert warned == expected
    gc.collect()
    assert not any(issubclass(type(o), FakeTensor) for o in gc.get_objects())


def test_a_step_that_cannot_fit_stops_before_weights_are_read(make, without_weights, trainer, tmp_path):
    with pytest.raises(OSError, match="has no weights"):
        trainer(Forecast(tmp_path / "run")).fit(*make(without_weights))
    told = json.loads((tmp_path / "run" / "forecast.json").read_text())
    few = told["weights"] + (told["peak"] - told["weights"]) // 2
    with pytest.raises(ValueError, match=r"a step of 8 x 62 tokens takes .*, more than the .* MB") as stopped:
        trainer(Forecast(memory=few)).fit(*make(without_weights))
    rows, batches = map(
        int, re.search(r"data.batch_size=(\d+) with trainer.accumulate_grad_batches=(\d+)", str(stopped.value)).groups()
    )
    assert 1 <= rows < 8 <= rows * batches
    trainer(Forecast(memory=few), max_epochs=1).fit(*make(batch_size=rows))
    with pytest.raises(ValueError, match=f"a step of {rows + 2} x 62"):
        trainer(Forecast(memory=few)).fit(*make(batch_size=rows + 2))


def test_a_step_that_cannot_fit_is_made_by_force(make, without_weights, trainer, capsys):
    trainer(Forecast(memory=1e6, force=True), max_epochs=1).fit(*make())
    assert "more than fits; force=true trains all the same" in capsys.readouterr().out
    with pytest.raises(OSError, match="has no weights"):
        trainer(Forecast(memory=1e6, force=True)).fit(*make(without_weights))


def test_where_nothing_fits_it_is_said(make, trainer):
    with pytest.raises(ValueError, match=r"memory must be a number of bytes above 0, .* but got 0"):
        Forecast(memory=0)
    with pytest.raises(ValueError, match="not even one row fits"):
        trainer(Forecast(memory=1000)).fit(*make())


def test_where_a_step_cannot_be_counted_training_goes_on(make, trainer, capsys, tmp_path):
    fit = trainer(Forecast(tmp_path / "run", memory=1), max_epochs=1)
    fit.fit(*make(method=LoRA(r=2, init_lora_weights="eva")))
    assert fit.state.finished
    said = " ".join(capsys.readouterr().out.split())
    assert "no forecast of a step's memory: what a step of LoRA takes cannot be counted" in said
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_once_by_training_itself(make, trainer, capsys):
    with pytest.raises(ValueError, match="nowhere"):
        trainer(Forecast()).fit(*make(method=LoRA(r=2, target_modules=["nowhere"])))
    assert "no forecast" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_has_what_others_leave():
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    before = memory_for_a_step(device)
    assert 0 < before <= total - RESERVE
    kept = torch.zeros(2**28, device=device)
    assert memory_for_a_step(device) <= total - kept.nbytes
