"""The models that the kept adapters belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def base_model(folder: Path | None = None) -> Any:
    """A tiny Llama: a fresh one, or the one that lies in a version's folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if folder is not None:
        model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        model.config.name_or_path = "base"  # wherever the folder lies
        return model
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=32, pad_token_id=0)).eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a model says to a fixed text, ``(batch, tokens, vocabulary)``."""
    ids = torch.arange(3, 15).view(2, 6)
    training = model.training
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(training)
    return logits.clone()


def batches() -> DataLoader[Any]:
    """Texts to train on."""
    rows = torch.randint(3, 20, (4, 2, 6), generator=torch.Generator().manual_seed(2))
    whole = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r} for r in rows]
    return DataLoader(whole, batch_size=None)


class Wrapped(L.LightningModule):
    """A module of somebody's own around the base."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.backbone = base_model(Path(folder))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.backbone(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)
