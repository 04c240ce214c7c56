"""Random generators across an interruption: Lightning's checkpoints hold none, so dropout would go another way."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

RESUMED = "_peft_random_state"
"""Where a module keeps the state that a resumed run has to go on with."""

_NUMPYS = 624  # numbers of numpy's generator


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

    Raises:
        ValueError: if it is not; then they stay where they are.
    """
    before = random_state()
    try:
        _refuse_odd(state)
        _restore(state)
    except Exception as error:  # each library has errors of its own for what it does not take
        _restore(before)
        raise ValueError(f"the checkpoint's random_state is none, it may be damaged: {error!r}") from error


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _refuse_odd(state: dict[str, Any]) -> None:
    """Refuses what no generator gives; numpy itself takes a place behind the end of its numbers, and reads there."""
    kind, keys, place, has_gauss, gauss = state["numpy"]
    fits = kind == "MT19937" and isinstance(keys, Tensor) and keys.shape == (_NUMPYS,) and not keys.is_floating_point()
    if not (
        fits and isinstance(place, int) and 0 <= place <= _NUMPYS and has_gauss in (0, 1) and gauss == float(gauss)
    ):
        raise ValueError("the part of numpy is no state of its generator")


def resume_random_state(module: LightningModule, state: dict[str, Any] | None) -> None:
    """To be called when a checkpoint is loaded: a fit that goes on draws what it would have drawn.

    That is before the loaders are asked for an order. Over several ranks it is left out, for the state is that of
    the first one alone, and all would draw the same.

    Args:
        module: the module that loads.
        state: as `random_state` gave it; None is left alone.

    Raises:
        ValueError: if it is no such state.
    """
    trainer = module._trainer
    if state is None or trainer is None or trainer.state.fn != "fit" or trainer.world_size > 1:
        return
    module.__dict__[RESUMED] = state
    restore_random_state(state)
