"""Strategies under which a checkpoint would lose what trains are refused before anything is adapted."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.nn import Linear, Sequential

from lightning_peft import LoRA
from lightning_peft.callbacks.adaptation import adapt_lightning_module


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_the_strategy_to_take_instead_is_named(kind):
    module = L.LightningModule()
    module.model = Sequential(Linear(4, 4))
    # neither is made on a machine without a GPU and its package
    module._trainer = SimpleNamespace(strategy=object.__new__(kind))
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*take ModelParallelStrategy"):
        adapt_lightning_module(module, LoRA(r=2), "model")
    assert not hasattr(module.model, "adapters")
