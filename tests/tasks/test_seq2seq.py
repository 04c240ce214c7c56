"""Sequence to sequence on tiny T5 and BART models."""

from __future__ import annotations

import json
import random

import lightning as L
import pytest
import torch

from lightning_peft import LoRA, PeftModule, PrefixTuning, PromptTuning, Selective, Seq2Seq, TextDataModule, adapt
from lightning_peft.tasks import task_from_config

WORDS = {"red": "large", "green": "small", "blue": "old", "cold": "new", "warm": "open"}
METRICS = {"loss", "perplexity", "token_accuracy"}
WRITTEN = {"exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"}


@pytest.fixture(scope="module")
def tokenizer():
    """A word is a token, and a text has an end and no beginning, as T5 has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *WORDS, *WORDS.values()])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request, tokenizer, tmp_path_factory):
    """A tiny model, its weights random."""
    import transformers

    path = tmp_path_factory.mktemp(request.param)
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if request.param == "t5":
        sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special))
    else:
        sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 2), ("ffn_dim", 64))}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}
        sizes = {"d_model": 32, "max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.2, **sides, **heads}
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **special))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each word has another one for it."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    shuffler = random.Random(0)
    sources = [shuffler.choices(list(WORDS), k=1 + i % 2) for i in range(160)]
    rows = [{"source": " ".join(s), "target": " ".join(WORDS[w] for w in s)} for s in sources]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_target_is_cut_at_its_own_length_and_ends_as_the_tokenizer_ends_texts(tokenizer):
    rows = [{"source": "red " * 20, "target": "blue " * 20}]
    (row,) = Seq2Seq(max_target_length=5).encode(rows, tokenizer, 12, training=True)
    assert len(row["input_ids"]) == 12
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["blue", "blue", "blue", "blue", "</s>"]
    (row,) = Seq2Seq().encode(rows, tokenizer, 12, training=True)
    assert len(row["labels"]) == 12


def test_labels_are_padded_with_what_the_loss_leaves_out(tokenizer):
    task = Seq2Seq()
    rows = [{"source": "red blue green", "target": "red"}, {"source": "red", "target": "red blue"}]
    batch = task.collate(task.encode(rows, tokenizer, 16, training=True), tokenizer, training=True)
    assert batch["labels"][0].tolist()[2:] == [-100]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("column", ["source", "target"])
def test_an_empty_text_is_refused_by_its_column(tokenizer, column):
    row = {"source": "red", "target": "blue", column: " "}
    with pytest.raises(ValueError, match=f"has an empty {column}: ' '"):
        Seq2Seq().encode([row], tokenizer, 16, training=True)


def test_options_out_of_their_range_and_other_models_are_refused_before_any_weights_are_read(bert_folder):
    with pytest.raises(ValueError, match="max_target_length must be 1 or more, but got 0"):
        task_from_config({"name": "seq2seq", "max_target_length": 0})
    with pytest.raises(ValueError, match=r"of the kind 'bert', for which .* no AutoModelForSeq2SeqLM; .* bart or t5"):
        PeftModule(str(bert_folder), LoRA(), "seq2seq").configure_model()


def _batches(tokenizer, task):
    shuffler = random.Random(1)
    sources = [shuffler.choices(list(WORDS), k=shuffler.randint(1, 6)) for _ in range(24)]
    rows = [{"source": " ".join(s), "target": " ".join(WORDS[w] for w in s[:4])} for s in sources]
    features = task.encode(rows, tokenizer, 16, training=True)
    return features, [task.collate(features[i : i + 4], tokenizer, training=True) for i in range(0, 24, 4)]


def test_the_losses_are_those_of_transformers_trainer(folder, tokenizer, trainer, tmp_path):
    """The same rows in the same order through both trainers; everything trains."""
    import transformers

    task = Seq2Seq()
    features, batches = _batches(tokenizer, task)
    theirs: list[float] = []

    class InOrder(transformers.Seq2SeqTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            theirs.append(float(loss))
            return loss

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model)
    InOrder(model, arguments, train_dataset=features, data_collator=collator).train()

    ours: list[float] = []
    module = PeftModule(str(folder), Selective(keep_originals=False), task, {"lr": 1e-2}, {"name": "constant"})
    module.tokenizer = tokenizer
    kept = task.loss

    def noted(outputs, batch):
        total, count = kept(outputs, batch)
        ours.append(float(total.detach() / count))
        return total, count

    task.loss = noted
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer(max_epochs=2, limit_val_batches=0).fit(module, loader)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(ours) == 12
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.slow
def test_it_learns_to_write_what_copying_and_the_untrained_model_do_not(folder, pairs, trainer):
    L.seed_everything(0, verbose=False)
    task = Seq2Seq(predict_with_generate=True)
    data = TextDataModule(train_files=pairs, validation_files=pairs, batch_size=8, max_length=16)
    module = PeftModule(str(folder), Selective(keep_originals=False), task, {"lr": 3e-3}, generation={"num_beams": 2})
    t = trainer(max_epochs=12, check_val_every_n_epoch=12)
    before = t.validate(module, data, verbose=False)[0]
    t.fit(module, data)
    after = t.validate(module, data, verbose=False)[0]
    assert {k.removeprefix("val/") for k in after} == METRICS | WRITTEN
    assert before["val/exact_match"] == 0
    copied = [r["source"] == r["target"] for r in data.rows("validation")]
    assert not any(copied)
    assert after["val/exact_match"] > 0.5
    assert after["val/loss"] < 0.2 * before["val/loss"]
    said = [row for batch in t.predict(module, data) for row in batch]
    right = [a["target"] == r["target"] for a, r in zip(said, data.rows("predict"), strict=True)]
    assert sum(right) / len(right) == pytest.approx(after["val/exact_match"])


@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(3), PrefixTuning(3)], ids=lambda m: type(m).__name__)
def test_adapters_and_prompts_train_validate_save_and_write(folder, pairs, trainer, tmp_path, method):
    L.seed_everything(0, verbose=False)
    task = Seq2Seq(max_target_length=8, predict_with_generate=True)
    data = TextDataModule(train_files=pairs, batch_size=16, max_length=16, limit=16, validation_fraction=0.1)
    module = PeftModule(str(folder), method, task)
    t = trainer(max_epochs=1)
    t.fit(module, data)
    assert {k for k in t.callback_metrics if k.startswith("val/")} == {f"val/{m}" for m in METRICS | WRITTEN}
    said = t.predict(module, data)
    module.save_adapter(tmp_path / "adapter")
    again = PeftModule.from_adapter(tmp_path / "adapter")
    assert again.task == task
    assert (
        trainer().predict(
            again, TextDataModule(train_files=pairs, max_length=16, batch_size=16, limit=16, validation_fraction=0.1)
        )
        == said
    )


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=lambda m: type(m).__name__)
def test_the_loss_of_a_prompt_does_not_depend_on_the_padding_beside_a_row(folder, tokenizer, perturb, method):
    from transformers import AutoModelForSeq2SeqLM

    task = Seq2Seq()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    perturb(adapt(model, method))
    features, _ = _batches(tokenizer, task)
    with torch.no_grad():
        whole = task.collate(features, tokenizer, training=True)
        together, count = task.loss(task.outputs(model, whole), whole)
        alone = [task.collate([f], tokenizer, training=True) for f in features]
        parts = [task.loss(task.outputs(model, b), b) for b in alone]
    assert int(count) == sum(int(c) for _, c in parts)
    torch.testing.assert_close(together, sum(total for total, _ in parts), rtol=1e-5, atol=1e-4)


def test_a_model_that_makes_its_decoders_input_only_within_its_forward_gets_the_same_loss(tokenizer):
    """M2M-100, which NLLB is, has no method for it."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(d_model=16, vocab_size=len(tokenizer), max_position_embeddings=32, **sides, **heads)
    model = M2M100ForConditionalGeneration(config).eval()
    task = Seq2Seq()
    _, (batch, *_) = _batches(tokenizer, task)
    with torch.no_grad():
        total, count = task.loss(task.outputs(model, batch), batch)
        expected = model(**batch).loss
    torch.testing.assert_close(total / count, expected)
