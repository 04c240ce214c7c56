"""How far a training takes a model from its base: measured right, by every way to train, and without a trace in it."""

from __future__ import annotations

import json
import random

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft import LoRA, PeftCallback, PeftModule, PromptTuning, Selective, TextDataModule
from lightning_peft.analysis.held_out import read_rows, stacks_of
from lightning_peft.analysis.run_files import FORGETTING
from lightning_peft.analysis.similarity import linear_cka
from lightning_peft.callbacks.base_reading import KEPT
from lightning_peft.callbacks.forgetting import Forgetting
from lightning_peft.data.held_out import held_out_texts
from lightning_peft.tasks.base_model import BaseModel

WORDS = ("red", "green", "blue", "small", "large")
TEXTS = [" ".join(WORDS[(i * j) % 5] for j in range(2 + i % 9)) for i in range(12)]
FULL = Selective(keep_originals=False, learning_rate=1e-2)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"{WORDS[i % 5]} {WORDS[i // 5 % 5]}", "label": WORDS[i % 3]} for i in range(24)]
    path.write_text("".join(json.dumps({**r, "prompt": r["text"], "completion": r["label"]}) + "\n" for r in lines))
    return str(path)


def _data(rows):
    return TextDataModule(train_files=rows, validation_files=rows, batch_size=6, max_length=16)


@pytest.fixture
def fit(trainer, bert_folder, llama_folder, rows):
    """Trains a tiny classifier, or a tiny language model, and gives both it and the trainer."""

    def run(method, *callbacks, task="text_classification", ckpt_path=None, **options):
        L.seed_everything(0, verbose=False)
        folder = bert_folder if task == "text_classification" else llama_folder
        module = PeftModule({"name_or_path": str(folder)}, method, task)
        run = trainer(*callbacks, num_sanity_val_steps=0, **{"max_epochs": 1, **options})
        run.fit(module, _data(rows), ckpt_path=ckpt_path, weights_only=True)
        return module, run

    return run


def _read(folder):
    return json.loads((folder / FORGETTING).read_text())


def _loss_by_hand(folder, module=None):
    """The mean over all tokens but each text's first, row by row and without padding."""
    base = BaseModel(str(folder))
    model = base.load(lp.tasks.task_from_config("sft"), None) if module is None else module.model
    tokenizer, total, count = base.load_tokenizer(), 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            logits = model.eval()(input_ids=ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize(
    "method", [LoRA(r=2, learning_rate=1e-2), FULL, PromptTuning(4)], ids=["lora", "full", "prompt"]
)
def test_a_language_models_forgetting_is_the_rise_of_its_loss_on_the_texts(method, fit, llama_folder, tmp_path):
    module, run = fit(method, Forgetting(tmp_path, TEXTS), task="sft")
    found = _read(tmp_path)
    assert found["schema"] == 1
    assert found["kind"] == "loss"
    # float32 sums in another order
    assert found["before"] == pytest.approx(_loss_by_hand(llama_folder), rel=1e-5)
    assert found["after"] == pytest.approx(_loss_by_hand(llama_folder, module), rel=1e-5)
    assert found["forgetting"] == found["after"] - found["before"]
    assert found["forgetting"] != 0
    assert list(found["layers"]) == ["model.layers.0", "model.layers.1"]
    assert float(run.callback_metrics["forgetting"]) == found["forgetting"]


def _states_by_hand(module, tokenizer, disabled):
    """Each layer's output for each token of each text, a text at a time: no padding is run."""
    found = {0: [], 1: []}
    with torch.no_grad(), module.adapter.disabled() if disabled else torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            output = module.model.eval()(input_ids=ids, output_hidden_states=True)
            for layer in found:
                found[layer].append(output.hidden_states[layer + 1][0, -ids.shape[1] :])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@pytest.mark.parametrize("method", [LoRA(r=2, learning_rate=1e-2), Selective(learning_rate=1e-2)], ids=["lora", "full"])
def test_an_encoders_forgetting_is_the_mean_distance_of_its_layers_from_the_bases(method, fit, tmp_path):
    callback = Forgetting(tmp_path, TEXTS)
    module, _ = fit(method, callback)
    before, after = (_states_by_hand(module, module.tokenizer, disabled=d) for d in (True, False))
    expected = [1 - linear_cka(before[i], after[i]) for i in before]
    found = _read(tmp_path)
    assert found == callback.result
    assert found["kind"] == "cka"
    assert list(found["layers"]) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    # float32 states, computed with and without padding
    assert list(found["layers"].values()) == pytest.approx(expected, rel=1e-3)
    assert found["forgetting"] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert found["before"] == 1
    assert found["after"] == pytest.approx(1 - found["forgetting"])


def test_a_model_whose_layers_do_not_train_has_forgotten_nothing(fit, tmp_path):
    fit(Selective(parameter_types=["head"]), Forgetting(tmp_path, TEXTS))
    found = _read(tmp_path)
    assert found["forgetting"] == 0
    assert set(found["layers"].values()) == {0}


METHODS = {
    "prompt_tuning": lambda: PromptTuning(4),
    "p_tuning": lambda: lp.PTuning(num_virtual_tokens=4),
    "deep_prompt": lambda: lp.DeepPrompt(num_virtual_tokens=4),
    "prefix_tuning": lambda: lp.PrefixTuning(4),
    "full": lambda: FULL,
    "ladder": lambda: lp.LadderSideTuning(reduction_factor=4),
    "loreft": lambda: lp.LoReFT(r=3),
    "houlsby": lambda: lp.BottleneckAdapter(reduction_factor=4),
    "eva": lambda: LoRA(r=2, init_lora_weights="eva"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_is_measured_on_the_texts_own_positions(name, fit, tmp_path):
    fit(METHODS[name](), Forgetting(tmp_path, TEXTS))
    found = _read(tmp_path)
    assert all(-1e-9 < drift <= 1 for drift in found["layers"].values())
    first, last = found["layers"].values()
    assert last > 0
    assert (first == 0) == (name == "ladder"), "a network beside the layers moves none before it joins them"


@pytest.mark.parametrize("method", [PromptTuning(4), lp.DeepPrompt(num_virtual_tokens=4), lp.PrefixTuning(4)])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "t5"])
def test_virtual_tokens_and_padding_are_left_out(name, method, build):
    model = build(name)
    lp.adapt(model, method)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids.where(mask.bool(), int(model.config.pad_token_id)), "attention_mask": mask}
    if name == "t5":
        batch |= {f"decoder_{k}": v for k, v in batch.items()}
    layers = stacks_of(model)
    assert len(layers) == (4 if name == "t5" else 2)
    together = read_rows(model, layers, [batch])
    alone = read_rows(model, layers, [{k: v[1:, :4] for k, v in batch.items()}])
    for layer, states in together.states.items():
        assert states.shape == (11, 32)
        # a padded row is computed in products of another shape
        torch.testing.assert_close(states[7:], alone.states[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["text_classification", "sft"])
@pytest.mark.parametrize("method", [LoRA(r=2, lora_dropout=0.3), FULL], ids=["lora", "full"])
def test_a_run_is_the_same_to_the_bit_with_and_without_it(method, task, fit, tmp_path):
    ends = []
    for callbacks in ([], [Forgetting(tmp_path, TEXTS)]):
        module, run = fit(method, *callbacks, task=task, max_epochs=2)
        dice = (torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1].tolist())
        ends.append((module.state_dict(), [p.training for p in module.modules()], dice, run.callback_metrics))
    (plain, modes, dice, metrics), (measured, modes_too, dice_too, metrics_too) = ends
    torch.testing.assert_close(measured, plain, rtol=0, atol=0)
    assert modes_too == modes
    assert torch.equal(dice_too[0], dice[0])
    assert dice_too[1:] == dice[1:]
    assert metrics == {k: v for k, v in metrics_too.items() if k != "forgetting"}


class Killed(L.Callback):
    """Ends a run within its second epoch, after a checkpoint."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


@pytest.mark.parametrize("method", [LoRA(r=2, learning_rate=1e-2), FULL], ids=["lora", "full"])
def test_a_resumed_run_writes_what_an_undisturbed_one_writes(method, fit, tmp_path):
    fit(method, Forgetting(tmp_path / "whole", TEXTS), max_epochs=2)
    with pytest.raises(RuntimeError, match="killed"):
        fit(method, Forgetting(tmp_path / "halves", TEXTS), Killed(tmp_path / "half.ckpt"), max_epochs=2)
    assert not (tmp_path / "halves" / FORGETTING).exists()
    checkpoint = str(tmp_path / "half.ckpt")
    fit(method, Forgetting(tmp_path / "halves", TEXTS), max_epochs=2, ckpt_path=checkpoint)
    assert _read(tmp_path / "halves") == _read(tmp_path / "whole")
    assert (tmp_path / "halves" / KEPT).exists() == (method is FULL), "where the base can be given back none is needed"


def test_a_run_that_goes_on_without_its_base_is_told_so(fit, tmp_path):
    callback = Forgetting(tmp_path / "first", TEXTS)
    _, run = fit(FULL, callback)
    checkpoint = str(tmp_path / "half.ckpt")
    run.save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"another.forgetting_base.safetensors is not there.*keep_originals=true"):
        fit(FULL, Forgetting(tmp_path / "another", TEXTS), ckpt_path=checkpoint, max_epochs=2)
    with pytest.raises(ValueError, match="no folder is given"):
        fit(FULL, Forgetting(texts=TEXTS), ckpt_path=checkpoint, max_epochs=2)
    with pytest.raises(ValueError, match="was made of other rows"):
        fit(FULL, Forgetting(tmp_path / "first", TEXTS[1:]), ckpt_path=checkpoint, max_epochs=2)
    kept = tmp_path / "first" / KEPT
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read, it may be damaged"):
        fit(FULL, Forgetting(tmp_path / "first", TEXTS), ckpt_path=checkpoint, max_epochs=2)


class Own(L.LightningModule):
    """A module of one's own around a Hugging Face model."""

    def __init__(self, backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch, batch_idx):
        return self.backbone(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture
def batches():
    ids = torch.randint(3, 97, (8, 7), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, torch.arange(8) % 3), batch_size=4)


class Letters:
    """A tokenizer of few words: a letter a token."""

    bos_token_id, cls_token_id, eos_token_id, pad_token_id = None, None, None, 0

    def __call__(self, texts, **options):
        ids = [[3 + ord(c) % 90 for c in text][: options.get("max_length")] for text in texts]
        return {"input_ids": ids if isinstance(texts, list) else []}


@pytest.mark.parametrize("where", ["backbone", None])
@pytest.mark.parametrize("method", [LoRA(r=2), FULL, None], ids=["lora", "full", "no method at all"])
def test_a_lightning_module_of_ones_own_is_measured(method, where, trainer, build, batches, tmp_path):
    callbacks = [Forgetting(tmp_path, TEXTS, model=where, tokenizer=Letters())]
    if method is not None:
        callbacks.insert(0, PeftCallback(method, model=where, print_plan=False))
    trainer(*callbacks).fit(Own(build("bert")), batches)
    found = _read(tmp_path)
    assert 0 < found["forgetting"] < 1
    assert list(found["layers"]) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("convnet", {}, "one Hugging Face model .*, but Own has none; leave the callback out"),
        ("bert", {"model": "back"}, "but Own has none at 'back'; leave the callback out"),
        ("bert", {}, r"Own has no tokenizer; give one: Forgetting\(tokenizer=...\)"),
        ("vit", {}, "the validation rows of an ImageDataModule, but got none"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(model, options, said, trainer, build, batches):
    with pytest.raises(TypeError, match=said):
        trainer(Forgetting(texts=TEXTS, **options)).fit(Own(build(model)), batches)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "rows must be 1 or more, but got 0"),
        ({"max_length": 1}, "max_length must be 2 or more, but got 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Forgetting(**options)


def test_a_strategy_that_shards_is_refused_at_setup(trainer):
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharded:
        strategy = ModelParallelStrategy.__new__(ModelParallelStrategy)

    with pytest.raises(ValueError, match="under ModelParallelStrategy no rank holds it"):
        Forgetting().setup(Sharded(), None, "fit")


def test_few_positions_are_warned_of(fit):
    with pytest.warns(UserWarning, match="positions of hidden states 32 wide, so few that CKA is near 1"):
        fit(LoRA(r=2), Forgetting(texts=TEXTS[:2]))


def test_texts_come_from_files(fit, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    found = []
    for texts in (TEXTS, tmp_path / "texts.txt", str(tmp_path / "texts.jsonl")):
        fit(LoRA(r=2), callback := Forgetting(texts=texts))
        found.append(callback.result)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("texts", "said"), [([], "holds no text"), (["red", " "], "holds an empty text")])
def test_texts_without_text_are_refused(texts, said, fit):
    with pytest.raises(ValueError, match=f"{said}; give a .txt file"):
        fit(LoRA(r=2), Forgetting(texts=texts))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text_classification", "sft"])
def test_the_default_texts_are_none_that_the_embedded_data_trains_on(task, tokenizer_folder):
    data = TextDataModule()
    data.connect(lp.tasks.task_from_config(task), BaseModel(tokenizer_folder).load_tokenizer())
    data.setup("fit")
    texts = held_out_texts(None, 10_000, data)
    assert len(texts) > 200
    assert {value for row in data.rows("train") for value in row.values()}.isdisjoint(texts)


def test_a_default_text_that_is_a_training_row_is_left_out(trainer, bert_folder, tmp_path):
    usual = held_out_texts(None, 3)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t, "label": w}) + "\n" for t, w in zip([usual[0], *TEXTS], "ab" * 9, strict=False))
    )
    data = _data(str(path))
    module = PeftModule({"name_or_path": str(bert_folder)}, LoRA(r=2))
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(module, data)
    assert held_out_texts(None, 2, data) == usual[1:]


def test_vision_models_are_shown_validation_images(trainer, vit_folder, draw, tmp_path):
    folder = str(draw())
    module = PeftModule({"name_or_path": str(vit_folder)}, LoRA(r=2, learning_rate=1e-2), "image_classification")
    callback = Forgetting(tmp_path)
    trainer(callback, num_sanity_val_steps=0).fit(module, lp.ImageDataModule(folder, batch_size=4))
    assert callback.result["kind"] == "cka"
    assert len(callback.result["layers"]) == 2
    assert 0 < callback.result["forgetting"] < 1


def test_it_stands_in_the_log_and_in_a_line_at_the_end(fit, tmp_path, capsys):
    from lightning.pytorch.loggers import CSVLogger

    fit(LoRA(r=2, learning_rate=1e-2), Forgetting(tmp_path, TEXTS), logger=CSVLogger(tmp_path / "logs", "", ""))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forgetting")]
    value = _read(tmp_path)["forgetting"]
    assert len(lines) == 1
    assert f"{value:.4f} 1 - CKA with the base" in lines[0]
    assert len(lines[0]) <= 80
    assert f"{value}" in (tmp_path / "logs" / "metrics.csv").read_text()
