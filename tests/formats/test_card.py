"""The model card of every export: what it says is known, and the code on it runs."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from lightning_peft import LoRA, PeftModule, PromptTuning, Selective, adapt, load_adapter
from lightning_peft.formats.hub import origin_of
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.methods.config import method_from_config
from tests.method_table import shown_data

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = Path(__file__).parents[2] / "conf" / "method"
PRESETS = sorted(p.stem for p in METHODS.glob("*.yaml"))
# what a YAML leaves to the user, and what tiny models have no room for
GIVEN = {
    "trainable_tokens": {"token_indices": [1996, 2709]},
    "compacter": {"reduction_factor": 4},
    "miss": {"r": 8},
    "shira": {"r": 4},
    "eva": {"r": 4},
    "bitfit": {"parameter_types": ["bias", "norm"]},
}
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _preset(name):
    config = OmegaConf.to_container(OmegaConf.load(METHODS / f"{name}.yaml"))
    return method_from_config({**config, **GIVEN.get(name, {})})


def _text(folder):
    return (folder / "README.md").read_text()


def _blocks(text):
    """The code of a card under the heading that it has there."""
    parts = re.findall(r"^##+ ([^\n]*)\n\n(?:(?!#|```)[^\n]*\n+)*```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return dict(parts)


def _run(code, **known):
    space = dict(known)
    exec(code, space)
    return space


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[:, -7:]


@pytest.fixture
def beside(tmp_path, monkeypatch, llama_folder, bert_folder):
    """A working directory in which the bases lie, as a reader of the card would have them."""
    (tmp_path / "llama").symlink_to(llama_folder)
    (tmp_path / "bert").symlink_to(bert_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PRESETS)
def test_each_way_of_loading_on_the_card_gives_the_same_model(name, beside, perturb):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("llama")
    adapter = shown_data(adapt(model, _preset(name)))
    perturb(adapter)
    expected = _logits(model)
    text = _text(adapter.save(beside / "out"))
    blocks = _blocks(text)
    assert torch.allclose(_logits(_run(blocks.pop("Here"))["model"]), expected, **CLOSE)
    if adapter.method.peft_type is not None:
        loaded = _run(blocks.pop("With Hugging Face PEFT"))["model"]
        assert torch.allclose(_logits(loaded), expected, **CLOSE)
    else:
        assert "PEFT does not know this method" in text
    if adapter.method.mergeable:
        assert torch.allclose(_logits(_run(blocks.pop("Merged, as a plain model"))["plain"]), expected, **CLOSE)
    else:
        assert "cannot be merged" in text
    assert not blocks, "nothing else is on it"


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "llama_adapter"])
def test_a_card_of_a_peft_module_loads_it_with_its_labels(name, beside, perturb):
    task = {"name": "text_classification", "labels": ["no", "yes", 'it\'s "open"']}
    module = PeftModule("bert", _preset(name), task)
    module.configure_model()
    perturb(shown_data(module.adapter))
    expected = _logits(module.model)
    text = _text(module.save_adapter(beside / "out"))
    blocks = _blocks(text)
    found = {"Here": _run(blocks["Here"])["module"].model}
    if "With Hugging Face PEFT" in blocks:
        found["peft"] = _run(blocks["With Hugging Face PEFT"])["model"]
    if "Merged, as a plain model" in blocks:
        found["plain"] = _run(blocks["Merged, as a plain model"])["plain"]
    for model in found.values():
        assert torch.allclose(_logits(model), expected, **CLOSE)
        assert model.config.id2label[2] == 'it\'s "open"'
    assert ("peft" in found, "plain" in found) == (module.method.peft_type is not None, module.method.mergeable)


@pytest.fixture
def named(build):
    """A tiny Llama that says that it is from the hub."""

    def make():
        model = build("llama")
        model.name_or_path = model.config.name_or_path = "somebody/llama"
        return model

    return make


def test_the_header_is_what_the_hub_reads_and_what_peft_writes(named, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(named(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    reference = ModelCard.load(tmp_path / "theirs" / "README.md").data
    folder = adapt(named(), LoRA(r=2)).save(tmp_path / "ours")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "somebody/llama"
    assert (card.data.library_name, card.data.pipeline_tag) == (reference.library_name, reference.pipeline_tag)
    assert set(reference.tags) <= set(card.data.tags)
    assert card.data.get("base_model_relation") == "adapter"
    assert "[`somebody/llama`](https://huggingface.co/somebody/llama)" in card.text
    assert str(card) == _text(folder)


def test_a_base_from_a_folder_is_named_without_its_path_and_not_in_the_header(beside, llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    card = ModelCard.load(adapt(model, Selective(parameter_types=["norm"])).save(beside / "out") / "README.md")
    assert card.data.base_model is None
    assert card.data.library_name == "lightning_peft"
    assert not [t for t in card.data.tags if t.startswith("base_model:")]
    assert str(llama_folder.parent) not in str(card)
    assert f"`{llama_folder.name}`" in card.text


def test_what_is_not_known_is_left_out(build, tmp_path):
    text = _text(adapt(build("convnet"), LoRA(r=2, target_modules=["conv1"])).save(tmp_path / "out"))
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    here = ["How to load it", "Here", "With Hugging Face PEFT", "Merged, as a plain model"]
    assert headings == [*here, "Method", "Versions"]
    assert not re.search(r"unknown|needed|None|pipeline_tag|base_model|model-index|transformers import|curves", text)
    assert "`model` is the base as it was adapted, a `ConvNet`" in text
    assert not (tmp_path / "out" / "curves.png").exists()
    space = _run(_blocks_of(text, tmp_path)["Merged, as a plain model"], model=build("convnet"))
    assert not hasattr(space["merged"], "adapters")


def _blocks_of(text, folder):
    return {k: v.replace('"out"', repr(str(folder / "out"))) for k, v in _blocks(text).items()}


def test_only_options_that_differ_from_the_defaults_are_listed(build, tmp_path):
    text = _text(adapt(build("llama"), LoRA(r=3, use_rslora=True)).save(tmp_path / "a"))
    assert re.findall(r"^\| `(\w+)` \| `(.*?)` \|$", text, re.MULTILINE) == [("r", "3"), ("use_rslora", "True")]
    assert "have their defaults" in _text(adapt(build("llama"), LoRA()).save(tmp_path / "b"))
    pytest.importorskip("peft")
    bridge = method_from_config({"_target_": "lightning_peft.HFPeft", "config": {"peft_type": "HRA", "r": 5}})
    text = _text(adapt(build("llama"), bridge).save(tmp_path / "c"))
    assert "HRA for LlamaForCausalLM" in text
    assert re.findall(r"^\| `(\w+)` \| `(.*?)` \|$", text, re.MULTILINE) == [("r", "5")]


def test_a_file_of_the_users_is_kept_and_that_is_said(build, tmp_path):
    for file in ("README.md", "curves.png"):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).write_text("mine")
        with pytest.warns(UserWarning, match=rf"{file}/{file} was there before and is kept: no model card is written"):
            adapt(build("bert"), LoRA(r=2)).save(folder)
        assert (folder / file).read_text() == "mine"
        assert len(list(folder.glob("README.md"))) == (file == "README.md")
        load_adapter(build("bert"), folder)


@pytest.mark.parametrize(("rank", "words"), [(8, ""), (20, "--max-lora-rank 32 ")])
def test_a_served_adapters_card_says_how_to_serve_it(named, tmp_path, rank, words):
    adapter = adapt(named(), LoRA(r=rank, target_modules=["gate_proj"]))
    text = _text(adapter.save_for("vllm", tmp_path / "out", max_lora_rank=32))
    assert f"vllm serve somebody/llama --enable-lora {words}--lora-modules out=out\n" in text
    assert "python convert_lora_to_gguf.py gguf\n" in _text(adapter.save_for("gguf", tmp_path / "gguf"))


def test_a_merged_models_card_loads_it_with_transformers_alone(beside, perturb):
    from transformers import AutoTokenizer

    module = PeftModule("bert", LoRA(r=2), {"name": "text_classification", "labels": ["a", "b", "c"]})
    module.configure_model()
    perturb(module.adapter)
    expected = _logits(module.model)
    folder = module.adapter.save_merged(beside / "whole", AutoTokenizer.from_pretrained("bert"))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    space = _run(code)
    torch.testing.assert_close(_logits(space["model"]), expected, **CLOSE)
    assert space["tokenizer"]("red").input_ids
    assert "peft import" not in card.text


def test_nothing_is_asked_of_a_network(named, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    adapter = adapt(named(), LoRA(r=2))
    assert _text(adapter.save(tmp_path / "a"))
    assert _text(adapter.save_for("vllm", tmp_path / "b"))
    assert _text(adapter.save_merged(tmp_path / "c"))


@pytest.mark.parametrize(
    ("said", "origin", "hub_name"),
    [
        ("/home/me/secret/texts.jsonl", "texts.jsonl", None),
        ("/home/me/a.jsonl and 2 more", "a.jsonl and 2 more", None),
        ("/home/me/parts/*.jsonl", "*.jsonl", None),
        ("docstrings", "docstrings", None),
        ("stanfordnlp/imdb", "stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("nyu-mll/glue:sst2", "nyu-mll/glue:sst2", "nyu-mll/glue"),
    ],
)
def test_data_is_named_without_where_it_lies(said, origin, hub_name):
    assert origin_of(said) == {"origin": origin, "hub_name": hub_name}


def test_a_folder_of_data_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "mine" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert origin_of("mine/rows") == {"origin": "rows", "hub_name": None}


def test_a_prompt_cannot_be_merged_and_says_so(named, tmp_path):
    text = _text(adapt(named(), PromptTuning(4)).save(tmp_path / "a"))
    assert "it cannot be merged into the base" in text


def _trained(model, folder, **noted):
    adapter = adapt(model, LoRA(r=2))
    adapter.tree.record.training = TrainingRecord(step=5, **noted)
    return ModelCard.load(adapter.save(folder) / "README.md")


def test_a_data_set_of_the_hub_is_in_the_header(named, tmp_path):
    data = {"splits": {"train": {"rows": 3}}, **origin_of("stanfordnlp/imdb")}
    card = _trained(named(), tmp_path / "a", data=data, metrics={"val/perplexity": [[5, 2.5]], "val/loss": [[5, 0.9]]})
    assert card.data.datasets == ["stanfordnlp/imdb"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("stanfordnlp/imdb", "perplexity", 2.5)
    assert "| validation loss | 0.9 |" in card.text
    assert "| train | 3 |" in card.text


def test_metrics_of_data_that_nobody_knows_are_on_the_card_and_not_in_the_header(named, tmp_path):
    card = _trained(named(), tmp_path / "a", metrics={"val/perplexity": [[5, 2.5]]})
    assert not card.data.eval_results
    assert "| validation perplexity | 2.5 |" in card.text


def test_many_labels_are_counted_and_any_label_stays_in_its_cell(build, tmp_path):
    labels = {f"l{i:02}": 2 for i in range(13)} | {"a|b <i>\n": 14}
    spread = {"median": 4.0, "largest": 9.0}
    splits = {
        "train": {"rows": 40, "labels": labels, "spreads": {"length": {**spread, "unit": "tokens"}}},
        "test": {"rows": 2, "spreads": {"target": spread}},
    }
    card = _trained(build("bert"), tmp_path / "a", data={"origin": "x.csv", "splits": splits})
    assert r"| a\|b \<i\> | 35.0% |" in card.text
    assert "| 2 more | 10.0% |" in card.text
    assert "| Split | Rows | Length in tokens (median, largest) | Target (median, largest) |" in card.text
    assert "| train | 40 | 4, 9 |  |" in card.text
    assert "cut to" not in card.text


HOSTILE = (
    "a`b",
    "```\n# heading",
    "<script>alert(1)</script>",
    "[click](https://example.org)",
    "![pixel](https://example.org/x.png)",
    "x | y\n| --- |",
    "---\nlicense: mit\n---\n",
    "*bold* _under_ **&amp;**",
    "\u202egnp.exe",
    "a\n\n## Training\n\nhttps://example.org",
)


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_others_stay_words(build, tmp_path, words):
    """Labels, names, options and settings are quoted, whatever they hold; the header's keys are ours."""
    counts = {
        "rows": 2,
        "labels": {words: 1, "plain": 1},
        "spreads": {words: {"median": 1, "largest": 2, "unit": words}},
    }
    training = TrainingRecord(
        step=2,
        setup=[[words, words]],
        versions={words: words},
        monitor=f"val/{words}",
        data={"origin": words, "seen_as": words, "splits": {"train": counts}},
        metrics={f"val/{words}": [[1, 0.5]]},
    )
    model = build("bert")
    model.config.name_or_path = words
    model.config._commit_hash = words
    model.config.id2label = {0: words, 1: "b", 2: "c"}
    adapter = adapt(model, LoRA(r=2, alpha_pattern={"query": 3}, modules_to_save=["classifier"]))
    adapter.tree.record.training = training
    adapter.tree.record.method.alpha_pattern[words] = 3
    folder = adapter.save(tmp_path / "a")
    text = _text(folder)
    card = ModelCard(text)
    assert set(card.data.to_dict()) <= {
        "base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags",
    }  # fmt: skip
    prose = re.sub(r"(`{3,})\w*\n.*?\n\1", "", text.split("\n---\n", 1)[1], flags=re.DOTALL)
    headings = re.findall(r"^#+ .*", prose, re.MULTILINE)
    assert [h for h in headings if h.startswith("## ")] == [
        "## How to load it", "## Method", "## Metrics", "## Data", "## Training", "## Versions",
    ]  # fmt: skip
    spans = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", prose)
    unescaped = re.sub(r"\\.", "", spans)
    assert "<" not in unescaped
    assert "](" not in unescaped.replace("![Losses and metrics over the steps of the training](curves.png)", "")
    assert "https://example" not in spans
    assert "\u202e" not in text
    for line in [row for row in prose.splitlines() if row.startswith("|")]:
        cells = re.sub(r"\\.", "", line)
        assert cells.count("|") in (3, 4, 5, 6), line
    # what is code is Python that can be read
    for code in re.findall(r"(`{3,})python\n(.*?)\n\1", text, re.DOTALL):
        compile(code[1], "card", "exec")


ODD = {
    "half_a_letter": {"data": {"origin": "a\ud800b", "hub_name": "a/b\ud800", "splits": {"train": {"rows": 3}}}},
    "header": {
        "data": {"origin": "x", "hub_name": "a: b\n- x\n---\n", "splits": {}},
        "metrics": {"val/a\n---": [[1, 1]]},
    },
    "curves": {"losses": [[1, 3e38, 1], [2**62, -3e38, 1]], "step": 5},
    "labels": {"data": {"splits": {"train": {"rows": 3, "labels": {"\ud800": 2**62, "": 0}}}}},
}


@pytest.mark.parametrize("notes", ODD.values(), ids=ODD)
def test_odd_notes_of_a_training_cost_the_card_at_most(build, tmp_path, notes):
    adapter = adapt(build("bert"), LoRA(r=2))
    adapter.tree.record.training = TrainingRecord.from_dict(notes)
    found = load_adapter(build("bert"), adapter.save(tmp_path / "a"))
    again = load_adapter(build("bert"), found.save(tmp_path / "b"))
    assert again.tree.record.training == adapter.tree.record.training
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.filterwarnings("default")
def test_a_card_that_cannot_be_made_is_told_of_and_the_adapter_is_saved(build, tmp_path, monkeypatch):
    adapter = adapt(build("bert"), LoRA(r=2))
    monkeypatch.setattr("lightning_peft.analysis.card.made_card", lambda *_: {}["what nobody thought of"])
    with pytest.warns(UserWarning, match=r"no model card is written, .*KeyError\('what nobody thought of'\)"):
        folder = adapter.save(tmp_path / "a")
    load_adapter(build("bert"), folder)
    assert not (folder / "README.md").exists()
