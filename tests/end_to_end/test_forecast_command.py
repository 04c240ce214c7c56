"""`lightning-peft forecast`: what a step takes and on which cards it fits, from a configuration without weights."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.processes import run


@pytest.fixture
def words(tmp_path):
    """A model of which there is nothing but its config.json."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"model_type": "llama", **sizes, "vocab_size": 500, "max_position_embeddings": 64, "pad_token_id": 0}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    return ["forecast", "model=hf", "model.name_or_path=folder", "task=sft"]


def test_parts_of_the_peak_and_cards_are_told(tmp_path, words):
    said = run(*words, "batch_size=2", "precision=bf16-mixed", "gpus=[H200,T4]", cwd=tmp_path).stdout
    assert "A step of 2 x 64 tokens in bf16-mixed, LoRA:" in said
    for part in ("weights that rest", "weights that train", "gradients", "optimizer's states", "kept for the backward"):
        assert re.search(rf"  {part}.* +\d+\.\d [kM]B", said)
    assert said.index("T4") < said.index("H200")
    assert re.search(r"T4 +15\.7 GB +yes +14\.9 GB", said)
    assert "…" not in said, "fits into 80 columns"
    assert "\x1b" not in said, "not a terminal"


def test_a_preset_is_told_by_the_options_that_make_it(tmp_path, words):
    assert "32-true, LoRA (use_dora=True):" in run(*words, "method=dora", "gpus=[T4]", cwd=tmp_path).stdout


def test_a_model_that_fits_nowhere_is_told_to(tmp_path, words):
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 65536, "intermediate_size": 65536}))
    said = run(*words, "batch_size=1", "gpus=[T4]", cwd=tmp_path).stdout
    assert re.search(r"T4 +15\.7 GB +no +-\d+\.\d [GT]B +0", said)
    assert "…" not in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("length=0", "length must be 1 or more, but got 0"),
        ("gpus=[A100]", "gpus: 'A100' may be A100-40GB or A100-80GB; write which"),
        ("batch_size=null", "batch_size must be 1 or more, but got None"),
        ("optimizer.name=LBFGS", "only with other optimizers"),
        ("precision=bf16", "precision must be one of 32-true"),
        ("method=hf_peft", "its layers are peft's own"),
        ("model.quantization=int8", "quantization=int8 takes cannot be counted"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, words, wrong, said):
    failed = run(*words, wrong, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_training_that_cannot_fit_stops_before_it_needs_the_weights(tmp_path, bert_folder):
    shutil.copytree(bert_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"text": "red " * (1 + i % 5), "label": i % 2} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", "data.train_files=texts.jsonl", "data.batch_size=4", "model.name_or_path=base"]
    stopped = run(*data, "callbacks.forecast.memory=4.1e6", "hydra.run.dir=run", cwd=tmp_path, check=False)
    assert stopped.returncode == 2
    assert re.match(
        r"lightning-peft: a step of 4 x 7 tokens takes 4\.3 MB, more than the 4\.1 MB that it may take; ",
        stopped.stderr,
    )
    assert json.loads((tmp_path / "run" / "forecast.json").read_text())["rows"] == 4
    forced = run(*data, "callbacks.forecast.memory=4.1e6", "force=true", cwd=tmp_path, check=False)
    assert "which is more than fits; force=true trains all the same" in forced.stdout
    assert "has no weights" in forced.stderr
