"""Adapters for vLLM and llama.cpp: the same numbers in their terms, or a refusal before anything is written."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import IA3, LoRA, PromptTuning, Selective, adapt, load_adapter
from lightning_peft.formats.serving import check_for

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "plain": LoRA(r=4, lora_alpha=6),
    "rslora": LoRA(r=4, lora_alpha=6, use_rslora=True),
    "ranks": LoRA(r=4, lora_alpha=6, rank_pattern={"q_proj": 2, "down_proj": 7}),
    "strengths": LoRA(r=4, lora_alpha=6, alpha_pattern={r"layers\.0\..*": 5}),
    "one_strength_of_its_own": LoRA(r=4, lora_alpha=6, alpha_pattern={r"\S*": 5}),
    "both_rslora": LoRA(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}),
    "pissa": LoRA(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "olora_ranks": LoRA(r=4, init_lora_weights="olora", rank_pattern={"o_proj": 2}),
}


def _llama(build):
    model = build("llama")
    model.config.name_or_path = "somebody/llama"
    return model


def _as_served(folder, consumer):
    """What the consumer computes from a folder: one ``alpha`` for all; llama.cpp knows no rsLoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == config["r"]
            root = config["use_rslora"] and consumer == "vllm"
            scale = config["lora_alpha"] / (math.sqrt(config["r"]) if root else config["r"])
            changes[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * b @ a
    return changes


@torch.no_grad()
@pytest.mark.parametrize("consumer", ["vllm", "gguf"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_served_is_the_adapters_change(method, consumer, build, call, perturb, tmp_path):
    model = _llama(build)
    adapter = adapt(model, method)
    perturb(adapter)
    folder = adapter.save_for(consumer, tmp_path / "served")
    for place, change in _as_served(folder, consumer).items():
        wanted = adapter.tree.layers_by_module[place].deltas(model.get_submodule(place))["weight"]
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-6)
    assert len(_as_served(folder, consumer)) == len(adapter.tree.layers_by_module)
    expected = call(model, "llama")
    theirs = peft.PeftModel.from_pretrained(_llama(build), folder).eval()
    torch.testing.assert_close(call(theirs, "llama"), expected, rtol=1e-5, atol=1e-5)
    again = build("llama")
    load_adapter(again, folder)
    torch.testing.assert_close(call(again, "llama"), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_plain_already_is_written_as_it_is(build, perturb, tmp_path):
    adapter = adapt(_llama(build), LoRA(r=4, lora_alpha=6))
    perturb(adapter)
    files = [adapter.save(tmp_path / "a"), adapter.save_for("vllm", tmp_path / "b")]
    plain, served = (load_file(f / "adapter_model.safetensors") for f in files)
    assert all(torch.equal(plain[k], served[k]) for k in plain | served)
    assert (files[0] / "adapter_config.json").read_text() == (files[1] / "adapter_config.json").read_text()
    there = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in files[1].iterdir()) == there
    assert json.loads((files[1] / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/llama"


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        (
            "llama",
            LoRA(r=4, use_dora=True),
            r"here is DoRA \(use_dora\); export a merged model instead \(format=merged",
        ),
        ("llama", LoRA(r=4, lora_bias=True), r"here is a bias \(lora_bias\)"),
        ("bert", LoRA(r=4, bias="all"), r"here is trained biases \(bias=all\); export"),
        ("llama", LoRA(r=4, modules_to_save=["norm"]), "here is 'model.norm', trained in full"),
        (
            "moe",
            LoRA(r=4, target_parameters=["experts.down_proj"]),
            "a layer on 'model.layers.0.mlp.experts', a MixtralExperts",
        ),
        (
            "llama",
            LoRA(r=4, target_modules=["q_proj", "embed_tokens"]),
            "a layer on 'model.embed_tokens', an Embedding",
        ),
        ("convnet", LoRA(r=2, target_modules=["conv1"]), "a layer on 'conv1', a Conv2d"),
        (
            "llama",
            LoRA(r=17, target_modules=["q_proj"]),
            r"the rank in the file is 17, above max_lora_rank=16; start .* --max-lora-rank 32",
        ),
        ("llama", LoRA(r=12, init_lora_weights="pissa"), "is 24 .twice that of the method.*, above max_lora_rank=16"),
        ("llama", LoRA(r=4, rank_pattern={"q_proj": 20}), "the rank in the file is 20, above max_lora_rank=16"),
        ("llama", IA3(), "reads LoRA alone, and IA3 is none; export a merged model instead"),
        ("llama", Selective(parameter_types=["norm"]), "reads LoRA alone, and Selective is none; export a merged"),
        ("llama", PromptTuning(4), "reads LoRA alone, and PromptTuning is none; serve it with transformers"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_written(name, method, said, build, tmp_path):
    adapter = adapt(build(name), method)
    with pytest.raises(ValueError, match=f"for=vllm: .*{said}"):
        adapter.save_for("vllm", tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_are_named_at_once(build):
    model = build("llama")
    adapt(model, LoRA(r=20, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]))
    with pytest.raises(
        ValueError, match=r"DoRA \(use_dora\), 'lm_head', trained in full; .*; the rank in the file is 20"
    ):
        check_for("vllm", model)
    with pytest.raises(ValueError, match=r"reads plain LoRA .* DoRA .*; .* under the name in adapter_config.json"):
        check_for("gguf", model)


def test_a_server_started_for_more_takes_more(build, tmp_path):
    adapter = adapt(build("llama"), LoRA(r=20, target_modules=["q_proj"]))
    check_for("vllm", adapter.model, max_lora_rank=32)
    assert adapter.save_for("vllm", tmp_path / "a", max_lora_rank=32).is_dir()
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        adapter.save_for("vllm", tmp_path / "a", max_lora_rank=32)
    with pytest.raises(ValueError, match="max_lora_rank must be a whole number of 1 or more, but got 0"):
        check_for("vllm", adapter.model, max_lora_rank=0)


def test_a_base_without_a_name_and_an_unknown_consumer_are_refused(build):
    model = build("llama")
    adapt(model, LoRA(r=4))
    check_for("vllm", model)
    with pytest.raises(ValueError, match=r"under the name in adapter_config.json, but this base has none"):
        check_for("gguf", model)
    with pytest.raises(ValueError, match="for=vlm is unknown; did you mean 'vllm'"):
        check_for("vlm", model)
