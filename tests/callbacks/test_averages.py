"""Averages of weights that Lightning's callbacks take, of an adapted module."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from lightning_peft import LoRA, PeftCallback
from tests.callbacks import ways
from tests.callbacks.ways import Net, Rows, same, without_batch_norm

way = ways.way

RESUMED_WITHOUT_KEEPING = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
ORDER = pytest.mark.parametrize("first", [True, False], ids=["adapter first", "average first"])


@ORDER
@RESUMED_WITHOUT_KEEPING
@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_an_exponential_average_is_one_of_the_adapted_module(way, first, trainer, tmp_path):
    def callbacks():
        average = EMAWeightAveraging(decay=0.5)
        return [*way.callbacks(), average] if first else [average, *way.callbacks()]

    class Formula(L.Callback):
        """The same average, kept beside."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
            self.mean = {n: 0.5 * self.mean[n] + 0.5 * p for n, p in now.items()} if trainer.global_step > 1 else now

    module, formula, keep = way.make(), Formula(), ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    torch.manual_seed(1)
    trainer(*callbacks(), formula, keep, max_epochs=3, enable_checkpointing=True, limit_val_batches=0).fit(
        module, way.data()
    )
    trained = dict(module.named_parameters())
    assert way.adapter in formula.mean
    for name, mean in formula.mean.items():
        torch.testing.assert_close(trained[name], mean)
    path = tmp_path / "kept" / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert way.base not in saved[part]
        assert way.adapter in saved[part]
    again = way.make()
    trainer(*callbacks(), max_epochs=3, limit_val_batches=0).fit(again, way.data(), ckpt_path=path, weights_only=True)
    assert same(again, module)


@ORDER
@RESUMED_WITHOUT_KEEPING
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_a_stochastic_average_is_one_of_the_adapted_module(way, first, trainer, tmp_path):
    def callbacks():
        average = StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=1, annealing_epochs=1)
        return [*way.callbacks(), average] if first else [average, *way.callbacks()]

    class Formula(L.Callback):
        """What each epoch began with."""

        def __init__(self):
            self.seen = []

        def on_train_epoch_start(self, trainer, pl_module):
            self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    module, formula = without_batch_norm(way.make()), Formula()
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    torch.manual_seed(1)
    trainer(*callbacks(), formula, keep, max_epochs=4, enable_checkpointing=True, limit_val_batches=0).fit(
        module, way.data()
    )
    trained = dict(module.named_parameters())
    assert way.adapter in formula.seen[0]
    for name in formula.seen[0]:
        torch.testing.assert_close(trained[name], torch.stack([s[name] for s in formula.seen]).mean(0))
    path = tmp_path / "kept" / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)
    (state,) = (s for key, s in saved["callbacks"].items() if "StochasticWeightAveraging" in key)
    assert way.base not in state["average_model_state"]
    assert way.adapter in state["average_model_state"]
    again = without_batch_norm(way.make())
    trainer(*callbacks(), max_epochs=4, limit_val_batches=0).fit(again, way.data(), ckpt_path=path, weights_only=True)
    assert same(again, module)


def test_an_average_that_would_reset_the_statistics_of_the_frozen_base_is_refused(trainer):
    average = StochasticWeightAveraging(swa_lrs=0.005)
    with pytest.raises(ValueError, match=r"'backbone.norm' belongs to the frozen base; use EMAWeightAveraging"):
        trainer(average, PeftCallback(LoRA(r=2), "backbone")).fit(Net(), Rows())
