"""Random generators across an interruption: Lightning's checkpoints hold none, so dropout would go another way."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

RESUMED = "_peft_random_state"
"""Where a module keeps the state that a resumed run has to go on with."""


def random_state() -> dict[str, Any]:
    """The state of all random generators in plain containers; Lightning's checkpoints hold none."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts the random generators where they were, so that a resumed run draws what it would have drawn.

    Args:
        state: as `random_state` gives it.
    """
    torch.set_rng_state(state["torch"].cpu())
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def resume_random_state(module: LightningModule, state: dict[str, Any] | None) -> None:
    """To be called when a checkpoint is loaded: a fit that goes on draws what it would have drawn.

    That is before the loaders are asked for an order. Over several ranks it is left out, for the state is that of
    the first one alone, and all would draw the same.

    Args:
        module: the module that loads.
        state: as `random_state` gave it; None is left alone.
    """
    trainer = module._trainer
    if state is None or trainer is None or trainer.state.fn != "fit" or trainer.world_size > 1:
        return
    module.__dict__[RESUMED] = state
    restore_random_state(state)
