"""The two ways in which a LightningModule gets its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_peft import LoRA, PeftCallback, PeftModule, TextDataModule, load_from_checkpoint
from tests.callbacks.ways import Net, Rows, Way


@pytest.fixture(params=["callback", "module"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    if request.param == "callback":
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
        return Way(
            Net,
            Rows,
            lambda path: load_from_checkpoint(Net, path),
            lambda net: net.eval()(x).detach(),
            "backbone.adapter.weight",
            "backbone.adapters.default.adapter.lora_B",
            lambda net: net.hparams["lr"],
            lambda: [PeftCallback(LoRA(r=2, lora_dropout=0.1), "backbone")],
        )
    words = ("red", "green", "blue", "small", "large")
    rows = [{"text": " ".join([words[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(32)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = str(request.getfixturevalue("bert_folder"))
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(9))

    def make() -> PeftModule:
        torch.manual_seed(0)
        return PeftModule(folder, LoRA(r=2, lora_dropout=0.1), optimizer={"lr": 0.01})

    return Way(
        make,
        lambda: TextDataModule(
            train_files=str(path), test_files=str(path), batch_size=4, max_length=16, validation_fraction=0.25
        ),
        lambda path: PeftModule.load_from_checkpoint(path, weights_only=True),
        lambda module: module.eval()(input_ids=ids).logits.detach(),
        "model.bert.encoder.layer.0.attention.self.query.weight",
        "model.adapters.default.bert.encoder.layer.0.attention.self.query.lora_B",
        lambda module: module.configure_optimizers()["optimizer"].defaults["lr"],
    )
