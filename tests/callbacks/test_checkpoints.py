"""What the command line's default callbacks keep of a run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CALLBACKS = Path(__file__).parents[2] / "conf" / "callbacks" / "default.yaml"


class Worse(L.LightningModule):
    """Its accuracy is best in the second epoch, and its run ends by an error after ``crash`` epochs."""

    def __init__(self, crash: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.crash = crash

    def training_step(self, batch, batch_idx):
        if self.current_epoch == self.crash:
            raise ValueError("the data ended")
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", [0.5, 0.7, 0.7, 0.6, 0.4][self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _callbacks(tmp_path):
    names = {"run_dir": str(tmp_path), "monitor": "accuracy", "mode": "max"}
    config = OmegaConf.merge(names, {"callbacks": OmegaConf.load(CALLBACKS)})
    return [instantiate(config.callbacks[name]) for name in ("checkpoint", "last")]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_the_last_checkpoint_is_the_newest_state_though_nothing_improves(trainer, tmp_path):
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    t = trainer(*_callbacks(tmp_path), enable_checkpointing=True, max_epochs=5)
    with pytest.raises(ValueError, match="the data ended"):
        t.fit(Worse(crash=4), loader, loader)
    folder = tmp_path / "checkpoints"
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in folder.iterdir()}
    assert steps == {"best.ckpt": 8, "last.ckpt": 16}
    assert Path(t.checkpoint_callback.best_model_path).name == "best.ckpt"
    assert float(t.checkpoint_callback.best_model_score) == torch.tensor(0.7)

    again = trainer(*_callbacks(tmp_path), enable_checkpointing=True, max_epochs=5)
    again.fit(Worse(), loader, loader, ckpt_path=folder / "last.ckpt", weights_only=True)
    assert again.global_step == 20
    assert float(again.checkpoint_callback.best_model_score) == torch.tensor(0.7)
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in folder.iterdir()}
    assert steps == {"best.ckpt": 8, "last.ckpt": 20}
