"""`lightning_peft.doctor`: runs that are really trained, each with a fault of its own, and what is said of them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from lightning_peft.doctor import examine
from tests.conftest import SIZES

pytestmark = [
    pytest.mark.slow,
    # of tiny splits a metric may be a whole number
    pytest.mark.filterwarnings("ignore:.*the value needs to be floating to be reduced"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]
NOISE = ["one", "two", "three", "four", "five", "six", "seven", "eight", "sun", "moon", "tree", "house", "river"]


def _train(folder: Path, *words: str) -> Path:
    """Trains as ``lightning-peft train`` does, in this process."""
    from lightning_peft.cli.commands import train

    given = [f"run_dir={folder}", "callbacks.interrupt=null", "trainer=cpu", "data=files", "data.batch_size=8", *words]
    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        config = compose("train", given)
    train(config)
    return folder


def _base(folder: Path, tokenizer_folder: str, seed: int = 0) -> Path:
    """A tiny BERT of large random weights, which tell words apart though nobody trained them."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    return _base(tmp_path_factory.mktemp("base"), tokenizer_folder)


def _rows(path: Path, count: int, label) -> str:
    """Texts of noise with a colour in it."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            text = " ".join(draw.choices(NOISE, k=4) + [["red", "blue"][i % 2]] * (3 + i % 3))
            file.write(json.dumps({"text": text, "label": label(i, draw)}) + "\n")
    return f"data.train_files={path}"


@pytest.fixture
def trained(tmp_path, base):
    def make(*words: str, rows: int = 160, label=lambda i, draw: ["warm", "cold"][i % 2]) -> Path:
        texts = _rows(tmp_path / "texts.jsonl", rows, label)
        few = ["data.max_length=16", "trainer.max_epochs=5", "trainer.log_every_n_steps=5"]
        return _train(tmp_path / "run", f"model.name_or_path={base}", texts, *few, *words)

    return make


def _findings(folder: Path):
    return {d.subject: d for d in examine(folder).findings}


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "prompt_tuning", "houlsby"])
def test_a_healthy_run_has_no_finding_and_all_of_it_is_looked_at(trained, method):
    examination = examine(trained(f"method={method}"))
    assert not examination.findings
    assert not [d.subject for d in examination.diagnoses if not d.seen]
    assert not examination.lacking


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_rate_of_almost_nothing_is_found_to_be_too_low_and_to_move_nothing(trained, method):
    found = _findings(trained("optimizer.lr=1e-7", f"method={method}"))
    assert {"rate too low", "movement"} <= found.keys()
    assert "hardly moved" in found["movement"].found
    assert found["rate too low"].remedy == {"lora": "optimizer.lr=0.002", "ia3": "optimizer.lr=0.02"}[method]
    assert not {"rate too high", "gradients", "overfitting", "base", "end"} & found.keys()


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_rate_beyond_all_measure_is_found_to_be_too_high(trained, method):
    found = _findings(trained("optimizer.lr=10", f"method={method}"))
    assert "learning rate 10 (" in found["rate too high"].evidence
    assert "optimizer.lr=0.0" in found["rate too high"].remedy
    assert not {"rate too low", "movement", "gradients", "overfitting", "base", "end"} & found.keys()


@pytest.mark.filterwarnings("ignore:no gradient reached")
def test_an_adapter_that_the_model_goes_past_is_found_by_its_names(trained, monkeypatch):
    from lightning_peft.methods.lora_on_linear import LinearLayer

    monkeypatch.setattr(LinearLayer, "forward", lambda self, base, *args, **kwargs: base(*args, **kwargs))
    found = _findings(trained("method.target_modules=[query,value]"))
    assert found["gradients"].found.startswith("A part of the adapter got no gradient")  # the new head trains
    assert "8 of 10 trained tensors" in found["gradients"].evidence
    assert "lora_A" in found["gradients"].evidence


@pytest.mark.filterwarnings("ignore:no gradient reached")
def test_without_moments_what_stands_still_tells_that_it_got_no_gradient(trained, monkeypatch):
    from lightning_peft.methods.lora_on_linear import LinearLayer

    monkeypatch.setattr(LinearLayer, "forward", lambda self, base, *args, **kwargs: base(*args, **kwargs))
    folder = trained("method.target_modules=[query,value]", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0")
    found = _findings(folder)
    assert "4 exactly as they started" in found["gradients"].evidence, "B starts at zero, and A at numbers drawn"


def test_parts_that_a_method_leaves_as_they_are_are_no_finding(trained):
    assert "gradients" not in _findings(trained("method=lora_fa"))


def test_learning_by_heart_is_found_to_be_overfitting(trained):
    found = _findings(
        trained(
            *(f"+model.config.{part}_dropout_prob=0.0" for part in ("hidden", "attention_probs")),
            *("method.learning_rate=6e-3", "trainer.max_epochs=16", "data.validation_fraction=0.34"),
            rows=48,
            label=lambda i, draw: draw.choice(["warm", "cold"]),
        )
    )
    assert "callbacks=early_stopping" in found["overfitting"].remedy
    assert not {"rate too low", "movement", "gradients", "end"} & found.keys()


def test_answers_that_are_cut_off_are_found(tmp_path, llama_folder, capsys):
    rows = [{"prompt": f"say {i}", "completion": "red blue sun moon " * 6} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.name_or_path={llama_folder}", "task=sft", f"data.train_files={tmp_path / 'rows.jsonl'}"]
    folder = _train(tmp_path / "run", *words, "data.max_length=8", "trainer.max_epochs=2", "optimizer.lr=1e-2")
    found = _findings(folder)
    assert "of what is learnt is lost; validation" in found["truncation"].evidence
    needed = int(found["truncation"].remedy.removeprefix("data.max_length=").split()[0])
    again = _train(tmp_path / "again", *words, f"data.max_length={needed}", "trainer.max_epochs=2")
    assert "truncation" not in _findings(again), "the length that it names is enough"


def test_where_every_weight_trains_no_base_is_told_from_another(trained):
    (base,) = (d for d in examine(trained("method=full", rows=32)).diagnoses if d.subject == "base")
    assert "all weights train, so none is left by which to tell another base" in base.evidence
    assert base.found is None


def test_an_adapter_beside_another_base_is_found(trained, tmp_path, tokenizer_folder):
    folder = trained("trainer.max_epochs=1")
    other = _base(tmp_path / "other", tokenizer_folder, seed=1)
    config = (folder / "config.yaml").read_text()
    name = next(line for line in config.splitlines() if "name_or_path" in line)
    (folder / "config.yaml").write_text(config.replace(name, f"  name_or_path: {other}"))
    found = _findings(folder)["base"]
    assert "names and shapes agree, values do not" in found.evidence
    assert "model.name_or_path" in found.remedy


def test_an_adapter_of_another_run_is_found(trained, tmp_path, tokenizer_folder):
    folder = trained("trainer.max_epochs=1")
    other = _base(tmp_path / "other", tokenizer_folder, seed=1)
    texts = f"data.train_files={tmp_path / 'texts.jsonl'}"
    elsewhere = _train(tmp_path / "second", f"model.name_or_path={other}", texts, "trainer.max_epochs=1")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(elsewhere / "adapter", folder / "adapter")
    assert "trained on different bases" in _findings(folder)["base"].found


def test_a_run_that_was_interrupted_is_found_with_how_far_it_came(trained, tmp_path, monkeypatch):
    import lightning as L

    class Killed(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise RuntimeError("the machine went away")

    from lightning_peft.cli import commands

    monkeypatch.setattr(commands, "EpochLines", Killed)
    with pytest.raises(RuntimeError, match="went away"):
        trained()
    found = _findings(tmp_path / "run")
    assert found["end"].evidence == "there is no metrics.json; step 32, 2 of 5 epochs"
    assert "ckpt_path=last" in found["end"].remedy
    assert not {"rate too high", "gradients", "base"} & found.keys()


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_numbers_that_are_none_are_found(trained, tmp_path):
    with pytest.raises(ValueError, match="not finite"):  # which ends the run when its best checkpoint is exported
        trained("callbacks.non_finite_loss=null", "optimizer.lr=1e30", "trainer.max_epochs=2")
    found = _findings(tmp_path / "run")
    assert "NaN or infinite values in" in found["rate too high"].evidence


def test_nothing_is_written_and_what_is_missing_is_said(trained):
    folder = trained("trainer.max_epochs=1")
    (folder / "data.json").unlink()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"cut short")
    shutil.rmtree(folder / "adapter")
    before = sorted(folder.rglob("*"))
    examination = examine(folder, check_base=False)
    assert sorted(folder.rglob("*")) == before
    assert examination.lacking == ("data.json is not there", "adapter is not there")
    (damaged,) = [d for d in examination.findings if d.subject == "files"]
    assert damaged.evidence.startswith(str(folder / "checkpoints" / "last.ckpt"))
    unseen = {d.subject: d.evidence for d in examination.diagnoses if not d.seen}
    assert unseen.keys() >= {"truncation", "guessing", "overfitting"}
