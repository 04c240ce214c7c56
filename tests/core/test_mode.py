"""The mode of a layer around the whole model, which no name leads to."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_peft import PeftCallback, PromptTuning, adapt
from lightning_peft.core.mode import evaluating


def test_a_layer_around_the_whole_model_is_put_into_evaluation_and_back(build):
    for training in (True, False):
        model = build("gpt2").train(training)
        tree = adapt(model, PromptTuning(4)).tree
        for root, part in [(model, tree), _pair(copy.deepcopy(model)), _pair(pickle.loads(pickle.dumps(model)))]:
            layer = part.layers_by_module[""]
            assert layer.training == training
            with evaluating(root):
                assert not layer.training
            assert layer.training == part.training == training
            root.train(not training)
            assert layer.training == (not training)


def _pair(model):
    return model, model.adapters["default"]


def test_a_validation_leaves_the_layer_around_the_whole_model_training(build, trainer):
    seen = {"training": set(), "validation": set()}

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("gpt2").train()

        def training_step(self, batch, batch_idx):
            return self._loss(batch, "training")

        def validation_step(self, batch, batch_idx):
            self._loss(batch, "validation")

        def _loss(self, batch, when):
            seen[when].add(self.model.adapters["default"].layers_by_module[""].training)
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    loader = DataLoader(torch.randint(3, 97, (4, 9)), batch_size=2)
    trainer(PeftCallback(PromptTuning(4), "model"), max_epochs=2).fit(Net(), loader, loader)
    assert seen == {"training": {True}, "validation": {False}}
