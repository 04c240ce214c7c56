"""PeftModule on tiny local models: training, checkpoints, resuming, predicting."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_peft import AdaLoRA, LoRA, PeftModule, PromptTuning, Selective, TextDataModule, adapt
from tests.method_table import TABLE

WORDS = ("red", "green", "blue", "small", "large")


@pytest.fixture
def texts(tmp_path):
    """Twenty-four short texts of different lengths in two classes."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join([WORDS[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    """Prompts with completions of very different lengths."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {WORDS[i % 5]}:", "completion": " ".join([WORDS[i % 5]] * (1 + i % 6))} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


class Losses(L.Callback):
    """Notes every training loss."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def _data(files, **options):
    return TextDataModule(train_files=files, batch_size=4, max_length=24, **options)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        (LoRA(r=2, lora_dropout=0.1), "32-true"),
        (LoRA(r=2, lora_dropout=0.1), "bf16-mixed"),
        (LoRA(r=2, lora_dropout=0.1), "bf16-true"),
        (AdaLoRA(target_r=1, init_r=2, deltaT=3), "32-true"),
        (AdaLoRA(target_r=1, init_r=2, deltaT=3), "bf16-true"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_resumed_run_continues_the_same_run(bert_folder, texts, trainer, tmp_path, method, precision, every):
    """With dropout on, in the middle of an epoch or at its end: the same losses and the same tensors."""

    def module():
        L.seed_everything(0, verbose=False)
        return PeftModule(str(bert_folder), method)

    keep = {"every_n_train_steps": 7} if every == "step" else {"every_n_epochs": 1}
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{step}", **keep)
    whole, seen = module(), Losses()
    trainer(checkpoint, seen, precision=precision, enable_checkpointing=True, max_epochs=3).fit(whole, _data(texts))
    path = sorted((tmp_path / "c").iterdir(), key=lambda p: int(p.stem.split("=")[1]))[0]
    step = int(path.stem.split("=")[1])
    again, rest = module(), Losses()
    torch.manual_seed(123)
    trainer(rest, precision=precision, max_epochs=3).fit(again, _data(texts), ckpt_path=path, weights_only=True)
    assert rest.seen == seen.seen[step:]
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("row", [r for r in TABLE if "bert" in r.models], ids=lambda r: r.name)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_gives_back_the_adapted_model(bert_folder, texts, trainer, tmp_path, row, weights_only):
    module = PeftModule(str(bert_folder), row.make())
    t = trainer(max_epochs=1)
    t.fit(module, _data(texts))
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    again = PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    ids = torch.randint(5, 90, (2, 6))
    with torch.no_grad():
        expected = module.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = again.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(found, expected)
    assert again.task.labels == ["even", "odd"]


def test_a_checkpoint_is_small_plain_and_says_what_it_is(bert_folder, texts, trainer, tmp_path):
    module = PeftModule(str(bert_folder), LoRA(r=2))
    t = trainer()
    t.fit(module, _data(texts))
    t.save_checkpoint(tmp_path / "a.ckpt")
    trained = module.adapter.plan.trainable
    assert (tmp_path / "a.ckpt").stat().st_size < 1.1 * 3 * 4 * trained + 100_000
    record = torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_peft"]
    assert record["methods"]["default"] == {"_target_": "lightning_peft.LoRA", **vars(LoRA(r=2))}
    assert record["base"]["name"] == str(bert_folder)
    assert len(record["base"]["fingerprint"]) == 16
    assert "model.adapters.default.classifier.weight" in record["tensors"]


@pytest.mark.parametrize("method", [LoRA(r=2), Selective(parameter_types=["bias"]), PromptTuning(4)])
def test_a_new_head_trains_and_is_saved_without_being_asked_for(bert_folder, texts, trainer, method):
    module = PeftModule(str(bert_folder), method)
    trainer(max_epochs=1).fit(module, _data(texts))
    assert module.adapter.tree.record.copies == ["classifier"]
    assert "classifier.weight" in module.adapter.state_dict()
    assert "classifier.bias, classifier.weight" in str(module.adapter.plan)


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_gradient_accumulation_does_not_change_the_result(llama_folder, pairs, trainer, accumulated):
    """Whatever the micro-batches: the gradient is that of the mean over the step's supervised tokens."""
    L.seed_everything(0, verbose=False)
    module = PeftModule(str(llama_folder), LoRA(r=2), "sft", {"name": "SGD", "lr": 1.0}, {"name": "constant"})
    data = TextDataModule(train_files=pairs, batch_size=12 // accumulated, max_length=24, validation_fraction=0.25)
    data.connect(module.task, module.tokenizer)
    data.setup("fit")
    rows = data._features["train"]
    rows = rows.select(sorted(range(len(rows)), key=lambda i: rows[i]["length"])[:12])
    data._features["train"] = rows
    data.train_dataloader = lambda: torch.utils.data.DataLoader(
        rows, batch_size=12 // accumulated, collate_fn=data._collate(training=True)
    )
    module.configure_model()
    with torch.no_grad():  # at a zero B, A gets no gradient
        for p in module.adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    start = {n: t.clone() for n, t in module.adapter.state_dict().items()}
    trainer(max_epochs=1, accumulate_grad_batches=accumulated, limit_val_batches=0).fit(module, data)

    reference = PeftModule(str(llama_folder), LoRA(r=2), "sft")
    reference.configure_model()
    reference.adapter.tree.load_state_dict(start)
    reference.train()
    batch = module.task.collate(rows, module.tokenizer, training=True)
    labels = batch.pop("labels")
    loss = reference.model(**batch, labels=labels).loss  # transformers' own mean over supervised tokens
    loss.backward()
    for (name, moved), p in zip(module.adapter.state_dict().items(), reference.adapter.parameters(), strict=True):
        torch.testing.assert_close(start[name] - moved, p.grad, rtol=1e-4, atol=1e-6)


def test_causal_language_modelling_learns_and_writes(llama_folder, pairs, trainer):
    L.seed_everything(0, verbose=False)
    method = LoRA(r=8, modules_to_save=["lm_head"])
    module = PeftModule(str(llama_folder), method, "sft", {"lr": 5e-3}, generation={"max_new_tokens": 4})
    data = _data(pairs, validation_files=pairs)
    t = trainer(max_epochs=12)
    before = t.validate(module, data, verbose=False)[0]
    t.fit(module, data)
    after = t.validate(module, data, verbose=False)[0]
    assert after["val/loss"] < 0.7 * before["val/loss"]
    assert math.isclose(after["val/perplexity"], math.exp(after["val/loss"]), rel_tol=1e-4)
    said = [row for batch in t.predict(module, data) for row in batch]
    assert len(said) == len(data.rows("predict"))
    assert all(set(row) == {"completion"} for row in said)


def test_an_encoder_made_causal_writes_too(bert_folder, pairs, trainer):
    module = PeftModule(str(bert_folder), LoRA(r=2), "sft", generation={"max_new_tokens": 2})
    trainer(max_epochs=1).fit(module, _data(pairs))
    assert module.model.config.is_decoder
    assert any(n.startswith("cls.predictions") for n in module.adapter.tree.record.new)


def test_an_exported_adapter_predicts_what_the_checkpoint_does(bert_folder, texts, trainer, tmp_path):
    module, data = PeftModule(str(bert_folder), LoRA(r=2)), _data(texts)
    t = trainer()
    t.fit(module, data)
    expected = t.predict(module, data)
    module.save_adapter(tmp_path / "adapter")
    again = PeftModule.from_adapter(tmp_path / "adapter")
    assert trainer().predict(again, _data(texts)) == expected
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        module.save_adapter(tmp_path / "adapter")


def test_an_adapter_predicts_on_rows_that_are_cut_as_in_training(bert_folder, texts, trainer, tmp_path):
    module = PeftModule(str(bert_folder), LoRA(r=2))
    t = trainer(max_epochs=1)
    t.fit(module, TextDataModule(train_files=texts, batch_size=8, max_length=6))
    module.save_adapter(tmp_path / "adapter")
    t.save_checkpoint(tmp_path / "a.ckpt")
    for loaded in (
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True),
        PeftModule.from_adapter(tmp_path / "adapter"),
    ):
        for given in (None, 20):
            data = TextDataModule(predict_files=texts, max_length=given)
            trainer().predict(loaded, data)
            longest = max(map(len, data.table("predict")["input_ids"].to_pylist()))
            assert longest == 6 if given is None else 6 < longest < 20


def test_a_data_module_cuts_rows_for_each_adapter_anew(bert_folder, texts, trainer, tmp_path):
    def longest(split):
        return max(map(len, data.table(split)["input_ids"].to_pylist()))

    def module():
        return PeftModule(str(bert_folder), LoRA(r=2), {"name": "text_classification", "labels": ["even", "odd"]})

    short, long = module(), module()
    t = trainer(max_steps=1)
    t.fit(short, TextDataModule(train_files=texts, max_length=4))
    t.save_checkpoint(tmp_path / "short.ckpt")
    data = TextDataModule(train_files=texts)
    trainer().validate(module(), data, verbose=False)
    assert longest("validation") > 4
    trainer().validate(short, data, verbose=False)
    assert longest("validation") == 4
    trainer(max_steps=1).fit(long, data)
    assert (longest("train") > 4, long.trained_max_length) == (True, 64)
    # Lightning reads a checkpoint when the data is there already
    trainer().predict(module(), data, ckpt_path=tmp_path / "short.ckpt")
    assert longest("predict") == 4


@pytest.mark.parametrize(("length", "said"), [("long", "'long'"), (2, "2"), (10**30, "1000"), (True, "True")])
def test_a_length_that_no_row_has_is_refused_where_a_file_says_it(bert_folder, texts, trainer, tmp_path, length, said):
    module = PeftModule(str(bert_folder), LoRA(r=2))
    t = trainer(max_steps=1)
    t.fit(module, TextDataModule(train_files=texts))
    folder = module.save_adapter(tmp_path / "adapter")
    path = folder / "lightning_peft.json"
    written = json.loads(path.read_text())
    assert written["info"]["max_length"] == 64
    written["info"]["max_length"] = length
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=rf"adapter.*max_length must be 4 to 1,000,000,000, or null, but it is {said}"):
        PeftModule.from_adapter(folder)
    t.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["lightning_peft"]["max_length"] = length
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"record of its adapters.*max_length must be 4 to .* but it is {said}"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_a_model_that_is_built_already_is_taken_and_asked_for_again(bert_folder, texts, trainer, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def model():
        return AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)

    module = PeftModule(model(), LoRA(r=2))
    module.tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    t = trainer(max_epochs=1)
    t.fit(module, _data(texts))
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt names no base, since its model was given already built"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", model=model(), weights_only=True)
    ids = torch.randint(5, 90, (2, 6))
    assert torch.equal(again.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


def test_wrong_options_are_named_before_anything_is_loaded(bert_folder):
    with pytest.raises(ValueError, match="optimizer 'AdamV' is unknown; did you mean 'Adam'"):
        PeftModule("x", LoRA(), optimizer={"name": "AdamV"})
    with pytest.raises(ValueError, match="scheduler 'linaer' is unknown; did you mean 'linear'"):
        PeftModule("x", LoRA(), scheduler={"name": "linaer"})
    with pytest.raises(ValueError, match="task 'text_clasification' is unknown; did you mean 'text_classification'"):
        PeftModule("x", LoRA(), "text_clasification")
    with pytest.raises(TypeError, match=r"a method such as LoRA.* is expected"):
        PeftModule("x", "lora")
    with pytest.raises(ValueError, match="model has no field 'nam'"):
        PeftModule({"nam": "x"}, LoRA())
    with pytest.raises(OSError, match="is no local folder and could not be fetched"):
        PeftModule("not/there", LoRA(), {"name": "text_classification", "labels": ["a", "b"]}).configure_model()


@pytest.mark.parametrize(
    ("virtual", "length", "way"),
    [
        (120, 24, "set data.max_length=8 or method.num_virtual_tokens=104 or less"),
        (126, 24, "set method.num_virtual_tokens=104 or less"),
        (600, 24, "set method.num_virtual_tokens=104 or less"),
        (20, 500, "set data.max_length=108 or less"),
        (600, 500, "set both lower"),
    ],
)
def test_virtual_tokens_plus_text_must_fit_before_training_begins(bert_folder, texts, trainer, virtual, length, way):
    module = PeftModule(str(bert_folder), PromptTuning(virtual))
    data = TextDataModule(train_files=texts, batch_size=4, max_length=length)
    with pytest.raises(ValueError, match=rf"{virtual} virtual tokens and max_length={length} .* 128 positions; {way}"):
        trainer().fit(module, data)


def test_a_checkpoint_of_another_base_is_refused(bert_folder, texts, trainer, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    t = trainer(max_epochs=1)
    t.fit(PeftModule(str(bert_folder), LoRA(r=2)), _data(texts))
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = AutoModel.from_pretrained(bert_folder)
    nn.init.normal_(other.embeddings.word_embeddings.weight)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made on another base"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", model=str(tmp_path / "other"), weights_only=True)


def test_importing_the_package_loads_neither_lightning_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys, lightning_peft, torch\n"
        "from lightning_peft import LoRA, adapt\n"
        "adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoRA(r=1))\n"
        "print([m for m in ('lightning', 'transformers', 'hydra', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_module_keeps_its_model_and_method_when_adapted_by_hand(build):
    """`adapt` and `PeftModule` share one injection, so what one adapted the other does not adapt again."""
    model = build("bert")
    adapt(model, LoRA(r=2))
    module = PeftModule(model, LoRA(r=2), {"name": "text_classification", "labels": ["a", "b", "c"]})
    module.configure_model()
    assert list(model.adapters) == ["default"]


def test_a_star_import_gives_the_methods_and_a_near_name_is_named():
    names: dict[str, object] = {}
    exec("from lightning_peft import *", names)
    assert names["LoRA"] is LoRA
    assert names["PeftModule"] is PeftModule
    import lightning_peft

    with pytest.raises(AttributeError, match="has no attribute 'Lora'; did you mean 'LoRA'"):
        lightning_peft.Lora  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'BottleneckAdapter'"):
        lightning_peft.BottleneckAdaptor  # noqa: B018


def test_a_schedule_of_the_rate_without_an_end_is_refused_and_a_constant_one_is_not(bert_folder, texts, trainer):
    endless = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(ValueError, match="scheduler=linear goes by the length of the training"):
        trainer(**endless).fit(PeftModule(str(bert_folder), LoRA(r=2)), _data(texts))
    constant = PeftModule(str(bert_folder), LoRA(r=2), scheduler={"name": "constant"})
    trainer(**endless).fit(constant, _data(texts))
    assert constant.trainer.global_step > 0


@torch.no_grad()
def test_a_vocabulary_that_was_enlarged_before_the_training_is_restored(llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    rows = model.get_input_embeddings().num_embeddings + 3
    model.resize_token_embeddings(rows)
    module = PeftModule(model, LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]), "causal_lm")
    module.configure_model()
    folder = module.save_adapter(tmp_path / "a")
    again = PeftModule.from_adapter(folder, str(llama_folder))
    assert again.model.get_input_embeddings().num_embeddings == rows
    ids = torch.tensor([[5, rows - 1, 7]])
    assert torch.equal(again.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


def test_another_base_is_the_users_word_alone(bert_folder, trainer, pairs, tmp_path):
    from transformers import AutoModel

    torch.manual_seed(5)
    other = tmp_path / "other"
    AutoModel.from_pretrained(bert_folder).save_pretrained(other)
    changed = AutoModel.from_pretrained(other)
    with torch.no_grad():
        changed.encoder.layer[0].output.dense.weight.add_(0.1)
    changed.save_pretrained(other)
    task = {"name": "text_classification", "labels": ["a", "b"]}
    module = PeftModule(str(bert_folder), LoRA(r=2), task)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    assert "check_base" not in checkpoint["hyper_parameters"]
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    folder = module.save_adapter(tmp_path / "a")
    for load in (
        lambda **given: PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", model=str(other), **given),
        lambda **given: PeftModule.from_adapter(folder, str(other), **given),
    ):
        with pytest.raises(ValueError, match=r"values do not in encoder.layer.0|values do not in bert.encoder.layer.0"):
            load()
        load(check_base=False)
