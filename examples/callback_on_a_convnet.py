"""PeftCallback on a hand-written LightningModule that is no language model.

A small convolutional net learns digits (scikit-learn's, so nothing is downloaded), then is adapted with LoRA to
the same digits turned by 90 degrees: the base stays as it is, 3 % of its parameters train.
"""

import tempfile
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_peft import LoRA, PeftCallback, load_from_checkpoint


class Digits(L.LightningModule):
    def __init__(self, base: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(576, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, 10)
        if base is not None:
            self.load_state_dict(torch.load(base, weights_only=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("accuracy", multiclass_accuracy(self(batch[0]), batch[1], 10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def digits(turned: bool) -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = images.rot90(1, (2, 3)) if turned else images
    labels = torch.tensor(y)
    train = TensorDataset(images[:1400], labels[:1400])
    return DataLoader(train, 64, shuffle=True), DataLoader(TensorDataset(images[1400:], labels[1400:]), 397)


def main() -> None:
    L.seed_everything(0, verbose=False)
    folder = Path(tempfile.mkdtemp())
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    base = Digits()
    L.Trainer(max_epochs=8, enable_checkpointing=False, **quiet).fit(base, *digits(turned=False))
    torch.save(base.state_dict(), folder / "base.pt")

    model = Digits(str(folder / "base.pt"))
    adapt = PeftCallback(LoRA(r=4, target_modules=["0", "2", "5"]), model="backbone")
    trainer = L.Trainer(max_epochs=8, callbacks=[adapt], default_root_dir=folder, **quiet)
    before = trainer.validate(model, digits(turned=True)[1], verbose=False)[0]["accuracy"]
    trainer.fit(model, *digits(turned=True))
    after = trainer.validate(model, digits(turned=True)[1], verbose=False)[0]["accuracy"]
    print(f"turned digits: accuracy {before:.3f} before, {after:.3f} after")

    path = Path(trainer.checkpoint_callback.best_model_path)
    print(f"the checkpoint holds {path.stat().st_size / 1e3:.0f} kB; the base alone {4 * 100_810 / 1e3:.0f} kB")
    again = load_from_checkpoint(Digits, path)
    x = next(iter(digits(turned=True)[1]))[0]
    assert torch.equal(again.eval()(x), model.eval()(x))
    with adapt.adapter(model).disabled():
        print("and with the adapter disabled the backbone is the base again")


if __name__ == "__main__":
    main()
