"""Fabric and a loop of one's own: adapt(), train, keep the adapter alone, load it again.

python fabric.py
"""

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, adapt, load_adapter


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    x, y = load_digits(return_X_y=True)
    rows = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, held_out = TensorDataset(*rows[:1400]), rows[1400:]

    model = make_base()
    adapter = adapt(model, LoRA(r=8, target_modules=["0", "2", "4"]))  # before fabric.setup, as every change of a model
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    running, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(train, 64, shuffle=True))
    for _ in range(5):
        for images, labels in loader:
            fabric.backward(nn.functional.cross_entropy(running(images), labels))
            optimizer.step()
            optimizer.zero_grad()

    folder = adapter.save(Path(tempfile.mkdtemp()) / "adapter")
    again = make_base()
    load_adapter(again, folder)
    with torch.no_grad():
        reached = (again(held_out[0]).argmax(-1) == held_out[1]).float().mean().item()
    share = sum(p.numel() for p in adapter.parameters()) / sum(p.numel() for p in make_base().parameters())
    print(f"accuracy {reached:.2f} with an adapter of {share:.0%} of the base's parameters, loaded from {folder.name}/")


if __name__ == "__main__":
    main()
