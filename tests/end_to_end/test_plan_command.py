"""`lightning-peft plan`: what a method would train, and what a step costs, from a configuration without weights."""

from __future__ import annotations

import json
import re

import pytest

from lightning_peft import LoRA, adapt
from tests.processes import run

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def words(tmp_path):
    """A model of which there is nothing but its config.json."""
    config = {"model_type": "llama", **SIZES, "vocab_size": 500, "max_position_embeddings": 64, "pad_token_id": 0}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    return ["plan", "model=hf", "model.name_or_path=folder", "task=sft"]


def test_a_folder_with_a_configuration_is_all_that_it_needs(tmp_path, words):
    said = run(*words, "method.target_modules=[q_proj,up_proj]", "batch_size=2", cwd=tmp_path).stdout
    assert f"trains {3 * 8 * (64 + 64 + 64 + 96):,} parameters" in said
    assert "; not mlp.down_proj, mlp.gate_proj, self_attn.k_proj, self_attn.o_proj, self_attn.v_proj" in said
    assert "Trains from model.layers.0.self_attn.q_proj on" in said
    assert re.search(r"A step of 2 x 64 tokens takes \d+\.\d MFLOP, \d\d% of what training all weights takes", said)
    assert "\x1b" not in said, "not a terminal"
    assert not any(tmp_path.rglob("*.safetensors"))


def test_the_backward_pass_that_is_spared_is_told(tmp_path, words):
    said = run(*words, "method=last_layers", "method.last_layers=1", cwd=tmp_path).stdout
    assert "Trains from model.layers.2.input_layernorm on; the 5" in said


def test_it_says_what_training_says(tmp_path, words, bert_folder):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    words = [f"model.name_or_path={bert_folder}", "method.r=4", "method.target_modules=all-linear"]
    said = run("plan", *words, cwd=tmp_path).stdout
    for line in str(adapt(model, LoRA(r=4, target_modules="all-linear")).plan).splitlines():
        assert line in said


def test_without_weights_the_configuration_tells_which_head_is_new(tmp_path, words):
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["LlamaForCausalLM"]}))
    words = [*words[:-1], "task=text_classification", "task.labels=[a,b,c]"]
    assert (
        "New in this model, so trained in full and saved without being asked for: score.weight"
        in run(*words, cwd=tmp_path).stdout
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("length=0", "length must be 1 or more, but got 0"),
        ("batch_size=-1", "batch_size must be 1 or more, but got -1"),
        ("method.target_modules=[q_porj]", "'q_porj'"),
        ("method=hf_peft", "HFPeft's layers are peft's own"),
        ("model.name_or_path=nowhere", "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, words, wrong, said):
    failed = run(*words, wrong, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
