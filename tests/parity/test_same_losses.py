"""The losses of whole trainings are those of TRL's SFTTrainer and of transformers' Trainer on the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import CausalLM, PeftModule, Selective, SupervisedFineTuning, TextDataModule

FOLDER = Path(__file__).parent / "trl_reference"
REFERENCE = json.loads((FOLDER / "reference.json").read_text())
# TRL's cases whose template has marks by hand, beside the published one without any
CHATML = (Path(__file__).parents[1] / "data" / "chat_templates" / "chatml.jinja").read_text()


def _train(task, features, tokenizer, trainer, *, rate, batch_size, epochs):
    """The loss of each step of SGD on all parameters, in the rows' order."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    module = PeftModule(model, Selective(keep_originals=False), task, {"name": "SGD", "lr": rate}, {"name": "constant"})
    batches = DataLoader(features, batch_size, collate_fn=lambda rows: task.collate(rows, tokenizer, training=True))
    losses = []
    module.training_step = _keeping(module.training_step, losses)
    trainer(max_epochs=epochs, limit_val_batches=0).fit(module, batches)
    return losses


def _keeping(step, losses):
    def kept(batch, batch_idx):
        loss = step(batch, batch_idx)
        losses.append(loss.item())
        return loss

    return kept


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", REFERENCE["cases"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")
def test_supervised_fine_tuning_is_trls(name, marked, trainer):
    case, sgd = REFERENCE["cases"][name], REFERENCE["sgd"]
    if not marked and name == "thinking_and_tools":
        pytest.skip("TRL's template for training writes thoughts where the published one leaves them out")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    plain = isinstance(case["rows"][0].get("prompt"), str)
    task = SupervisedFineTuning(chat_template=None if plain else case["template"] if marked else CHATML)
    length = case["options"].get("max_length", 1024)
    features = task.encode(case["rows"], tokenizer, length, training=True)
    size = sgd["batch_size"]
    for i, batch in enumerate(case["batches"]):
        start = i * size % len(features)
        ours = task.collate(features[start : start + size], tokenizer, training=True)
        wanted = {k: torch.tensor(batch[k]) for k in ("input_ids", "labels")}
        if name == "messages_as_prompt_and_completion":  # where TRL also learns the line's end behind the last turn
            newline = tokenizer("\n")["input_ids"][0]
            wanted["labels"][wanted["labels"] == newline] = -100
        torch.testing.assert_close({k: ours[k] for k in wanted}, wanted, rtol=0, atol=0)
    if name != "messages_as_prompt_and_completion":
        losses = _train(
            task, features, tokenizer, trainer, rate=sgd["learning_rate"], batch_size=size, epochs=sgd["epochs"]
        )
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(case["losses"]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' Trainer has some of its own
def test_language_modelling_in_blocks_is_transformers(trainer, tmp_path):
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    tokenizer, task = AutoTokenizer.from_pretrained(FOLDER), CausalLM()
    texts = [f"the weather in city {i} is sunny or cloudy; user {i * i} says hello 🦊" for i in range(12)]
    features = list(task.join(task.encode([{"text": t} for t in texts], tokenizer, 32, training=True), tokenizer, 32))
    assert len(features[-1]["input_ids"]) < 32

    class InOrder(Trainer):
        losses: list[float]

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        num_train_epochs=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    reference = InOrder(
        model=AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32),
        args=arguments,
        train_dataset=[{"input_ids": f["input_ids"]} for f in features],
        data_collator=lambda rows: {
            k: v
            for k, v in task.collate([{**r, "bytes": 0} for r in rows], tokenizer, training=True).items()
            if k != "bytes"
        },
    )
    reference.losses = []
    reference.train()
    losses = _train(task, features, tokenizer, trainer, rate=0.1, batch_size=3, epochs=2)
    assert len(losses) == 10
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference.losses), rtol=0, atol=1e-5)


def test_validation_is_in_the_blocks_of_training(tmp_path):
    (tmp_path / "a.txt").write_text("the weather in a city is sunny. " * 9)
    data = TextDataModule(train_files=str(tmp_path / "a.txt"), validation_files=str(tmp_path / "a.txt"), max_length=16)
    data.connect(CausalLM(), AutoTokenizer.from_pretrained(FOLDER))
    data.setup("fit")
    kept = [data._features[split].to_dict() for split in ("train", "validation")]
    assert kept[0] == kept[1]
    assert max(kept[0]["length"]) == 16
