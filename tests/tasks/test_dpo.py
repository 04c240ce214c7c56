"""Preference pairs: how they become tokens, the losses of TRL, and that they are learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from lightning_peft import DPO, LoRA, PeftModule, PrefixTuning, PromptTuning, Selective, TextDataModule, adapt
from lightning_peft.core.disable import disabled
from lightning_peft.tasks import task_from_config

REFERENCE = Path(__file__).parents[1] / "parity" / "dpo_reference.safetensors"
CASES = ("sigmoid", "sigmoid_beta", "ipo", "hinge", "smoothed", "saved_copies", "dropout")
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SYSTEM = {"role": "system", "content": "red"}
USER = {"role": "user", "content": "what is it"}


def _says(text):
    return {"role": "assistant", "content": text}


def _words_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def reference():
    """TRL's values, and what they were made of."""
    with safe_open(REFERENCE, "pt") as file:
        metadata = {k: json.loads(v) for k, v in file.metadata().items()}
        return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118 - it is no dictionary


@pytest.fixture(scope="module")
def tokenizer(reference):
    made = _words_tokenizer([*reference[1]["words"], "<|user|>", "<|assistant|>", "<|system|>"])
    made.chat_template = CHATML
    return made


def _part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture
def case_model(reference):
    """The base of a case, as it was before TRL trained it."""
    import transformers

    tensors, about = reference

    def make(name):
        kind, sizes = about["bases"][name]
        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**sizes))
        model.load_state_dict(_part(tensors, f"{name}/base/"))
        return model

    return make


@pytest.mark.parametrize("name", CASES)
def test_losses_and_rewards_of_six_steps_are_those_of_trl(reference, case_model, trainer, name):
    tensors, about = reference
    case = about["cases"][name]
    options = dict(case["trl"])
    if options.get("loss_type") == "aot":  # the smoothed sigmoid, of one pair a batch
        options["loss_type"] = "sigmoid"
    task = DPO(**options)
    module = PeftModule(
        case_model(case["base"]), LoRA(**case["lora"]), task, {"lr": about["rate"]}, {"name": "constant"}
    )
    module.tokenizer = _words_tokenizer(about["words"])
    module.configure_model()
    start = {
        k.removeprefix("base_model.model.").replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B"): v
        for k, v in _part(tensors, f"{name}/start/").items()
    }
    module.adapter.tree.load_state_dict(start)
    found: dict[str, list[float]] = {}
    kept = task.loss

    def noted(outputs, batch):
        total, count = kept(outputs, batch)
        metrics = task.metrics()
        task.update(metrics, outputs, batch)
        for key, value in {"loss": total.detach() / count, **metrics.compute()}.items():
            found.setdefault(key, []).append(float(value))
        return total, count

    task.loss = noted
    size = case.get("batch", 4)
    features = task.encode(about["pairs"][: 6 * size], module.tokenizer, 64, training=True)
    batches = [
        task.collate(features[i : i + size], module.tokenizer, training=True) for i in range(0, len(features), size)
    ]
    trainer(max_epochs=about["epochs"], limit_val_batches=0).fit(module, DataLoader(batches, batch_size=None))
    for key in ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"):
        assert found[key] == pytest.approx(tensors[f"{name}/{key}"].tolist(), abs=1e-5), key
    assert len(found["loss"]) == 6


def test_a_text_pair_shares_its_prompt_and_each_answer_has_one_end(tokenizer):
    row = {"prompt": "what is it", "chosen": "a cat", "rejected": "nothing </s>"}
    (found,) = DPO().encode([row], tokenizer, 16, training=True)
    assert tokenizer.convert_ids_to_tokens(found["input_ids"]) == ["what", "is", "it", "a", "cat", "</s>"]
    assert tokenizer.convert_ids_to_tokens(found["rejected_input_ids"]) == ["what", "is", "it", "nothing", "</s>"]
    assert found["labels"] == [-100] * 3 + found["input_ids"][3:]
    assert found["rejected_labels"] == [-100] * 3 + found["rejected_input_ids"][3:]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [_says("a cat")], "rejected": [_says("nothing")]},
        {"chosen": [USER, _says("a cat")], "rejected": [USER, _says("nothing")]},
        {"chosen": [USER | {"name": None}, _says("a cat")], "rejected": [USER, _says("nothing")]},
        {"prompt": "what is it", "chosen": [USER, _says("a cat")], "rejected": [USER, _says("nothing")]},
        {"prompt": [USER], "chosen": [USER, _says("a cat")], "rejected": [USER, _says("nothing")]},
    ],
    ids=["prompt", "implicit prompt", "empty entries of a table", "prompt as text too", "prompt in all three"],
)
def test_conversations_are_written_by_the_tokenizers_template(tokenizer, row):
    (found,) = DPO().encode([row], tokenizer, 32, training=True)
    before = ["<|user|>", "what", "is", "it", "</s>", "<|assistant|>"]
    assert tokenizer.convert_ids_to_tokens(found["input_ids"]) == [*before, "a", "cat", "</s>"]
    assert tokenizer.convert_ids_to_tokens(found["rejected_input_ids"]) == [*before, "nothing", "</s>"]
    assert found["labels"][:6] == [-100] * 6
    (alone,) = DPO().encode([row], tokenizer, 32, training=False)
    assert tokenizer.convert_ids_to_tokens(alone["input_ids"]) == before


def test_of_a_longer_answer_only_the_turns_of_the_assistant_count(tokenizer):
    row = {"prompt": [USER], "chosen": [_says("a"), USER, _says("cat")], "rejected": [_says("no")]}
    (found,) = DPO().encode([row], tokenizer, 32, training=True)
    said = tokenizer.convert_ids_to_tokens([i for i in found["labels"] if i != -100])
    assert said == ["a", "</s>", "cat", "</s>"]
    assert len(found["labels"]) == len(found["input_ids"]) == 16


def test_what_a_template_writes_behind_the_end_of_a_turn_is_not_learnt(reference):
    tokenizer = _words_tokenizer([*reference[1]["words"], "<|user|>", "<|assistant|>"])
    tokenizer.chat_template = CHATML.replace("</s> ", "</s> here ")
    row = {"prompt": [USER], "chosen": [_says("a cat")], "rejected": [_says("nothing")]}
    (found,) = DPO().encode([row], tokenizer, 32, training=True)
    assert tokenizer.convert_ids_to_tokens(found["input_ids"][-3:]) == ["a", "cat", "</s>"]


@pytest.mark.parametrize(("prompt", "answer"), [(40, 3), (3, 40), (40, 40)])
def test_too_long_a_pair_keeps_one_prompt_its_end_and_a_part_of_each_answer(tokenizer, prompt, answer):
    row = {"prompt": "red " * prompt + "here", "chosen": "cat " * answer, "rejected": "dog " * (answer // 2)}
    (found,) = DPO().encode([row], tokenizer, 16, training=True)
    length = found["labels"].count(-100)
    assert length == found["rejected_labels"].count(-100)
    assert max(len(found["input_ids"]), len(found["rejected_input_ids"])) == 16
    assert tokenizer.convert_ids_to_tokens(found["input_ids"])[length - 1] == "here"
    assert len(found["input_ids"]) - length >= 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "red", "chosen": "cat", "rejected": "cat"}, "the same answer as chosen and as rejected"),
        ({"prompt": "red", "chosen": "", "rejected": "cat"}, "has an empty chosen answer"),
        ({"chosen": "cat", "rejected": "dog"}, "has no column 'prompt', which only conversations can go without"),
        ({"prompt": [USER], "chosen": "cat", "rejected": "dog"}, "mixes texts and messages: prompt is a list"),
        ({"prompt": "red", "chosen": [_says("a")], "rejected": [_says("no")]}, "mixes texts and messages"),
        ({"prompt": "red", "chosen": "a", "rejected": [_says("no")]}, "mixes texts and messages"),
        ({"chosen": [_says("a")], "rejected": [_says("no")]}, "chosen and rejected conversations do not begin alike"),
        ({"chosen": [USER], "rejected": [USER, _says("a")]}, "conversations do not differ in a message"),
        (
            {"prompt": [USER], "chosen": [{"content": "a"}], "rejected": [_says("no")]},
            "no 'role' in message 1 of 'chosen'",
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, _says("a")], "rejected": [_says("no")]},
            "a chosen answer that does not begin with a turn of the assistant",
        ),
        ({"prompt": [USER], "chosen": [_says("")], "rejected": [_says("a")]}, "an empty content of role 'assistant'"),
        ({"prompt": "red", "chosen": [USER, _says("a")], "rejected": [USER, _says("no")]}, "mixes texts and messages"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_reason(tokenizer, row, said):
    with pytest.raises(ValueError, match=said):
        DPO().encode([row], tokenizer, 16, training=True)


def test_a_conversation_needs_a_template_and_a_prediction_a_prompt(reference, tokenizer):
    plain = _words_tokenizer(reference[1]["words"])
    row = {"prompt": [USER], "chosen": [_says("a")], "rejected": [_says("no")]}
    with pytest.raises(RuntimeError, match=r"no chat template; name one with\s+task.chat_template"):
        DPO().encode([row], plain, 16, training=True)
    assert DPO(chat_template=CHATML).encode([row], plain, 16, training=True)
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        DPO().encode([{}], tokenizer, 16, training=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0}, "beta must be above 0, but got 0"),
        ({"loss_type": "sigmod"}, "loss_type 'sigmod' is unknown; did you mean 'sigmoid'"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, but got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing is for loss_type='sigmoid', not 'ipo'"),
    ],
)
def test_options_out_of_their_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        task_from_config({"name": "dpo", **options})


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny Llama with weights at random and a word for a token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, **special, max_position_embeddings=64)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of two answers the one that names the colour of the prompt is preferred, whatever stands around it."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    shuffler, colours, rows = random.Random(0), ["red", "blue", "green"], []
    for _ in range(120):
        colour, other = shuffler.sample(colours, 2)
        prompt = shuffler.choices(["a", "an", "is", "here", "there", "it"], k=3)
        tail = shuffler.choice(["cat", "dog", "bird"])
        rows.append(
            {"prompt": " ".join([*prompt, colour]), "chosen": f"{colour} {tail}", "rejected": f"{other} {tail}"}
        )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_held_out_pairs_are_ordered_right_after_training_and_by_chance_before(folder, pairs, trainer, tmp_path):
    L.seed_everything(0, verbose=False)
    data = TextDataModule(train_files=pairs, batch_size=8, max_length=32, validation_fraction=0.3)
    module = PeftModule(folder, LoRA(r=8), DPO(), {"lr": 1e-2}, generation={"max_new_tokens": 2})
    t = trainer(max_epochs=6)
    before = t.validate(module, data, verbose=False)[0]
    assert before["val/margin"] == 0
    assert before["val/accuracy"] == 0
    assert before["val/loss"] == pytest.approx(0.693147, abs=1e-5)
    t.fit(module, data)
    after = t.validate(module, data, verbose=False)[0]
    assert set(after) == {f"val/{m}" for m in ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")}
    assert after["val/accuracy"] > 0.9
    assert after["val/margin"] == pytest.approx(after["val/reward_chosen"] - after["val/reward_rejected"], abs=1e-4)
    assert after["val/loss"] < before["val/loss"]
    said = t.predict(module, data)
    assert all(set(row) == {"completion"} for batch in said for row in batch)
    module.save_adapter(tmp_path / "adapter")
    assert "| task | dpo (beta 0.1" in (tmp_path / "adapter" / "README.md").read_text()
    again = PeftModule.from_adapter(tmp_path / "adapter")
    assert again.task == DPO()
    assert trainer().predict(again, data) == said


@pytest.mark.parametrize("method", [LoRA(r=2), LoRA(r=2, modules_to_save=["lm_head"])], ids=["LoRA", "a saved head"])
def test_an_untrained_adapter_has_no_preference_in_sixteen_bits_either(folder, tokenizer, method):
    from transformers import AutoModelForCausalLM

    task = DPO()
    rows = [{"prompt": "what is it", "chosen": "a cat", "rejected": "no"}]
    batch = task.collate(task.encode(rows, tokenizer, 16, training=True), tokenizer, training=True)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    adapt(model, method)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = task.outputs(model, batch)
    torch.testing.assert_close(torch.cat(outputs), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2, modules_to_save=["lm_head"]), PromptTuning(3), PrefixTuning(3), Selective(parameter_types=["norm"])],
    ids=lambda m: type(m).__name__,
)
def test_the_reference_is_the_base_whatever_trains(folder, tokenizer, perturb, method):
    from transformers import AutoModelForCausalLM

    task = DPO()
    rows = [
        {"prompt": "what is it", "chosen": "a cat", "rejected": "no"},
        {"prompt": "is it here", "chosen": "yes", "rejected": "no it is there"},
    ]
    batch = task.collate(task.encode(rows, tokenizer, 16, training=True), tokenizer, training=True)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    adapter = adapt(model, method)
    perturb(adapter)
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        found = torch.cat(task.outputs(model, batch))
        expected = task._log_likelihoods(model, batch) - task._log_likelihoods(base, batch)
        torch.testing.assert_close(found, expected)
        assert found.abs().min() > 1e-4
        with disabled(model):
            torch.testing.assert_close(task._log_likelihoods(model, batch), task._log_likelihoods(base, batch))
    assert [m.training for m in model.modules()] == modes
    total, _ = task.loss(task.outputs(model, batch), batch)
    total.backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)


def test_a_method_that_keeps_no_base_is_refused_before_training_begins(folder, pairs, trainer):
    module = PeftModule(folder, Selective(keep_originals=False), DPO())
    data = TextDataModule(train_files=pairs, max_length=32)
    with pytest.raises(ValueError, match=r"DPO compares with the base, which is gone .* keep_originals=True"):
        trainer().fit(module, data)
    assert module.trainer.global_step == 0


def test_pairs_of_one_prompt_stay_on_one_side_of_the_split(folder, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"red {i % 5}", "chosen": f"cat {i}", "rejected": f"dog {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=path, max_length=32)
    data.connect(DPO(), tokenizer)
    data.setup("fit")
    train, validation = ({r["prompt"] for r in data.rows(split)} for split in ("train", "validation"))
    assert not train & validation
    rows = [{"chosen": [USER, _says(f"cat {i}")], "rejected": [USER, _says("no")]} for i in range(20)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TextDataModule(train_files=path, max_length=32)
    data.connect(DPO(), tokenizer)
    data.setup("fit")
    assert len(data.rows("validation")) == 4
