"""The losses of `PeftModule` and of transformers' own Trainer on the same batches, step by step."""

from __future__ import annotations

import copy
import json

import lightning as L
import pytest
import torch

from lightning_peft import Adapter, ImageDataModule, PeftModule, Selective, TextDataModule

pytest.importorskip("accelerate")

WORDS = ("red", "green", "blue", "small", "large")
TEXTS = [" ".join(WORDS[(i * j) % 5] for j in range(1, 2 + i % 7)) for i in range(24)]
LABELS = {
    "single": [WORDS[i % 3] for i in range(24)],
    "multi": [[w for w in WORDS[:3] if w in text] for text in TEXTS],
    "one number": [len(text) / 10 for text in TEXTS],
    "several numbers": [[len(text) / 10, i / 24] for i, text in enumerate(TEXTS)],
}
TYPES = {"single": "single_label_classification", "multi": "multi_label_classification"}
TASKS = {
    **{
        kind: (
            {"name": "text_classification", "problem_type": TYPES.get(kind, "regression")},
            [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)],
        )
        for kind, labels in LABELS.items()
    },
    "tags": (
        {"name": "token_classification"},
        [
            {"tokens": text.split(), "tags": ["O" if w in WORDS[3:] else f"B-{w}" for w in text.split()]}
            for text in TEXTS
        ],
    ),
}
RATE = 0.1


class Losses(L.Callback):
    """Notes every training loss."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def losses_of_trainer(model, batches, folder):
    """Trains a model as transformers does it, and gives the loss of each step, which its logs round."""
    from transformers import Trainer, TrainingArguments

    seen = []

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(float(loss))
            return loss

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = TrainingArguments(
        folder, num_train_epochs=2, max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    SameBatches(model, options, train_dataset=batches, optimizers=(optimizer, constant)).train()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_a_head_is_trained_with_the_losses_of_trainer(kind, bert_folder, trainer, tmp_path):
    task, rows = TASKS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "name_or_path": str(bert_folder),
        "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }
    L.seed_everything(0, verbose=False)
    module = PeftModule(
        spec, Selective(parameter_types=["head"]), task, {"name": "SGD", "lr": RATE}, {"name": "constant"}
    )
    data = TextDataModule(train_files=str(path), validation_files=str(path), batch_size=5, max_length=16)
    data.connect(module.task, module.tokenizer)
    data.setup("fit")
    loader = torch.utils.data.DataLoader(data._features["train"], 5, collate_fn=data._collate(training=True))
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in loader]
    assert len({len(batch["input_ids"]) for batch in batches}) == 2, "the last is shorter"
    _same_losses(module, data, loader, batches, trainer, tmp_path)


@pytest.mark.slow
def test_a_head_for_images_is_trained_with_the_losses_of_trainer(vit_folder, draw, trainer, tmp_path):
    folder = draw(each=8)
    L.seed_everything(0, verbose=False)
    module = PeftModule(
        str(vit_folder),
        Selective(parameter_types=["head"]),
        "image_classification",
        {"name": "SGD", "lr": RATE},
        {"name": "constant"},
    )
    data = ImageDataModule(train_files=folder, validation_files=folder, batch_size=5)
    data.connect(module.task, module.processing_class)
    data.setup("fit")
    rows = data.features("train")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    loader = torch.utils.data.DataLoader(
        rows, batch_sampler=[order[i : i + 5] for i in range(0, 24, 5)], collate_fn=data._collate(training=True)
    )
    _same_losses(module, data, loader, list(loader), trainer, tmp_path)


def _same_losses(module, data, loader, batches, trainer, folder):
    """Trains the module and a copy of it on the same batches, here and as transformers does it."""
    data.train_dataloader = lambda: loader
    module.configure_model()
    reference = Adapter(copy.deepcopy(module.model)).merge_and_unload()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    seen = Losses()
    trainer(seen, max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0).fit(module, data)
    expected = losses_of_trainer(reference, batches, folder)
    assert len(expected) == 10
    assert expected[5:] != pytest.approx(expected[:5], abs=1e-4), "it is trained"
    assert seen.seen == pytest.approx(expected, abs=1e-5)
