"""LoRA+: a larger rate for B than for A (Hayou et al., arXiv 2402.12354, 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module, Parameter

from lightning_peft.core.problems import raise_problems


def lora_plus_groups(
    model: Module, lr: float, loraplus_lr_ratio: float = 16, *, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: what trains, with a larger rate for LoRA's B.

    Vectors (biases, magnitudes) learn as fast as B, whole matrices such as a new head's as A does.

    Args:
        model: the adapted model, or the LightningModule that holds it.
        lr: rate of A.
        loraplus_lr_ratio: how many times as fast B learns, 1 or more; 16 is the authors' choice.
        lr_embedding: rate of LoRA on embeddings.

    Returns:
        One dictionary with ``params`` and ``lr`` a group; empty groups are left out.

    Raises:
        ValueError: if a rate is not above 0, the ratio is below 1, or nothing that trains is LoRA's B.

    Example:
        >>> from torch import nn, optim
        >>> from lightning_peft import LoRA, adapt, lora_plus_groups
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> adapter = adapt(model, LoRA(r=2))
        >>> optimizer = optim.AdamW(lora_plus_groups(model, lr=1e-3))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.016]
    """
    raise_problems(
        "LoRA+",
        [
            f"lr must be above 0, but got {lr}" if lr <= 0 else None,
            f"lr_embedding must be above 0, but got {lr_embedding}" if lr_embedding <= 0 else None,
            f"loraplus_lr_ratio must be 1 or more, but got {loraplus_lr_ratio}" if loraplus_lr_ratio < 1 else None,
        ],
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    embedding = {id(p) for n, p in trained if "lora_embedding_" in n}
    fast = {id(p) for n, p in trained if id(p) not in embedding and ("lora_B" in n or p.ndim == 1)}
    if not any("lora_B" in n for n, _ in trained):
        raise ValueError(
            "LoRA+: nothing that trains is LoRA's B; adapt the model with LoRA before the optimizer is made, or leave "
            "loraplus_lr_ratio out"
        )
    slow = [p for _, p in trained if id(p) not in fast | embedding]
    rates: list[tuple[Iterable[Parameter], float]] = [
        (slow, lr),
        ((p for _, p in trained if id(p) in fast), lr * loraplus_lr_ratio),
        ((p for _, p in trained if id(p) in embedding), lr_embedding),
    ]
    groups = [{"params": list(parameters), "lr": rate} for parameters, rate in rates]
    return [g for g in groups if g["params"]]
