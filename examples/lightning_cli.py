"""LightningCLI: model, data and method from a file of YAML, every option also on the command line.

python lightning_cli.py fit --config lightning_cli.yaml
python lightning_cli.py fit --config lightning_cli.yaml --trainer.callbacks.method.init_args.r 4
python lightning_cli.py fit --print_config    # all that can be set
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    """A net for scikit-learn's digits, which knows nothing of adapters.

    Args:
        width: of the hidden layers.
        lr: the learning rate.
    """

    def __init__(self, width: int = 64, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.backbone = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class DigitsData(L.LightningDataModule):
    """The digits, in batches.

    Args:
        batch_size: rows in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        x, y = load_digits(return_X_y=True)
        rows = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
        return DataLoader(rows, self.batch_size, shuffle=True)


if __name__ == "__main__":
    LightningCLI(Digits, DigitsData, seed_everything_default=0)
