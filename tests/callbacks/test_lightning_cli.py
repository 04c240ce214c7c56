"""LightningCLI builds the callback with every method, its options checked by their types."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf

from lightning_peft import LoRA, PeftCallback
from lightning_peft.methods.config import method_from_config

METHODS = Path(__file__).parents[2] / "conf" / "method"
YAMLS = {p.stem: OmegaConf.to_container(OmegaConf.load(p)) for p in METHODS.glob("*.yaml")}
YAMLS["trainable_tokens"]["token_indices"] = [3]


@pytest.fixture(autouse=True)
def _no_words(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])


def _callback(method, **options):
    callback = {"class_path": "lightning_peft.PeftCallback", "init_args": {"method": method, **options}}
    trainer = {"callbacks": [callback], "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    cli = LightningCLI(
        BoringModel, run=False, args={"trainer": trainer, "seed_everything": 0}, save_config_callback=None
    )
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, PeftCallback))
    return found


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_a_method_is_built_from_its_class_path_and_options(name):
    options = {k: v for k, v in YAMLS[name].items() if k != "_target_"}
    found = _callback({"class_path": YAMLS[name]["_target_"], "init_args": options})
    assert found.method == method_from_config(YAMLS[name])


def test_an_option_of_the_wrong_type_is_refused(capsys):
    assert _callback({"class_path": "lightning_peft.LoRA", "init_args": {"r": 4}}, model="layer").method == LoRA(r=4)
    with pytest.raises(SystemExit):
        _callback({"class_path": "lightning_peft.LoRA", "init_args": {"r": "many"}})
    assert "'many'" in capsys.readouterr().err
