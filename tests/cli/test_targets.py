"""What a configuration has made is of this package or listed, whatever a file says."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_peft import LoRA, TextDataModule
from lightning_peft.cli.targets import OWN_TARGETS, made

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "subprocess.Popen",
        "lightning_peft.formats.reading.torch.load",
        "lightning_peft.formats.reading.json.loads",
        "lightning_peft.cli.commands.load",
        "lightning_peft.load_adapter",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.callbacks.model_checkpoint.os.system",
        "lightning_peftx.LoRA",
        "hydra.utils.instantiate",
        "",
        3,
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_another_target_is_refused_and_not_called(target, nested):
    config = {"_target_": target}
    if nested:
        config = {"_target_": "lightning_peft.TextDataModule", "train_files": "x", "transform": [{"a": config}]}
    with pytest.raises(ValueError, match=r"is none of the listed: lightning_peft, .*LIGHTNING_PEFT_TARGETS="):
        made(OmegaConf.create(config))


def test_ones_own_package_is_taken_where_the_environment_names_it(monkeypatch):
    monkeypatch.setenv(OWN_TARGETS, "somebody, fractions.Fraction")
    assert made({"_target_": "fractions.Fraction", "numerator": 3}) == 3
    with pytest.raises(ValueError, match="is none of the listed"):
        made({"_target_": "fractionsx.Fraction"})


def test_what_this_package_ships_and_documents_is_taken():
    assert made(OmegaConf.create({"_target_": "lightning_peft.LoRA", "r": 4})) == LoRA(r=4)
    mirror = made({"_target_": "PIL.ImageOps.mirror", "_partial_": True})
    assert mirror.func.__module__ == "PIL.ImageOps"
    files = [*(CONF / "callbacks").glob("*.yaml"), *(CONF / "logger").glob("csv.yaml")]
    for path in files:
        for part in OmegaConf.load(path).values():
            if "_target_" in part:
                assert made({"_target_": part["_target_"], "_partial_": True})
    assert isinstance(made({"_target_": "lightning_peft.TextDataModule", "train_files": "x"}), TextDataModule)
