"""`lightning-peft inspect`: what an adapter changes, from a folder or a checkpoint, with and without its base."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import BottleneckAdapter, LoRA, PeftCallback, Selective, adapt
from lightning_peft.cli.inspected import inspected
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel
from tests.processes import run


@pytest.fixture
def foreign(tmp_path, llama_folder, monkeypatch):
    """An adapter that peft wrote: of rank 8, of which 2 are used."""
    import peft
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("COLUMNS", "80")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
        wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter[:, :2] = torch.randn(len(parameter), 2, generator=generator) * 0.01
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped


def test_an_adapter_of_peft_is_told_as_peft_itself_would_merge_it(tmp_path, foreign):
    before = {n.replace(".base_layer", ""): p.double() for n, p in foreign.get_base_model().state_dict().items()}
    said = run("inspect", "adapter=adapter", "to=page", cwd=tmp_path).stdout
    assert "rank of 2 of 8 (8 of 32 directions, 24 unused); r=2 would do everywhere" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    assert "\x1b" not in said, "not a terminal"
    found = json.loads((tmp_path / "page" / "inspect.json").read_text())
    after = foreign.merge_and_unload().state_dict()
    assert len(found["changes"]) == 4
    for name, change in found["changes"].items():
        delta = after[f"{name}.weight"].double() - before[f"{name}.weight"]
        values = torch.linalg.svdvals(delta)
        # peft's merged weights are rounded to float32
        assert change["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert change["relative"] == pytest.approx(float(delta.norm() / before[f"{name}.weight"].norm()), rel=1e-4)
        assert change["singular_values"][:2] == pytest.approx(values[:2].tolist(), rel=1e-4)
        assert (change["rank"], change["unused"], change["capacity"]) == (2, 6, 8)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["tensors"].keys() == tensors.keys()
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "page" / "inspect.html").read_text()


def test_without_the_base_the_norms_stand_alone(tmp_path, foreign, llama_folder):
    whole = run("inspect", "adapter=adapter", f"base={llama_folder}", "to=whole", cwd=tmp_path)
    assert "of weight" in whole.stdout
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "nowhere/at-all"}))
    said = " ".join(run("inspect", "adapter=adapter", "to=alone", cwd=tmp_path).stdout.split())
    assert "Without its base ('nowhere/at-all' is no local folder" in said
    assert "norms of the changes alone, relative to nothing" in said
    assert "of weight" not in said
    first, second = (json.loads((tmp_path / f / "inspect.json").read_text())["changes"] for f in ("whole", "alone"))
    assert {n: c["norm"] for n, c in second.items()} == pytest.approx({n: c["norm"] for n, c in first.items()})
    assert all(c["relative"] is None for c in second.values())


def test_a_base_that_is_asked_for_and_not_there_is_an_error(tmp_path, foreign):
    failed = run("inspect", "adapter=adapter", "base=nowhere/at-all", cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert "'nowhere/at-all' is no local folder" in failed.stderr


@pytest.mark.slow
def test_a_trained_checkpoint_and_its_folder_say_the_same(tmp_path, bert_folder):
    rows = [{"text": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", "data.train_files=texts.jsonl", "data.batch_size=4"]
    words = [f"model.name_or_path={bert_folder}", "trainer.max_epochs=1", "method.r=2", "hydra.run.dir=run"]
    run(*words, *data, cwd=tmp_path)
    numbers = {}
    for name, adapter in (("checkpoint", "run/checkpoints/best.ckpt"), ("folder", "run/adapter")):
        for base in ("true", "false"):
            to = f"{name}_{base}"
            said = run("inspect", f"adapter={adapter}", f"read_base={base}", f"to={to}", cwd=tmp_path).stdout
            numbers[to] = json.loads((tmp_path / to / "inspect.json").read_text())
    assert numbers["checkpoint_true"]["changes"] == numbers["folder_true"]["changes"]
    assert numbers["checkpoint_false"]["changes"].keys() == numbers["folder_false"]["changes"].keys()
    assert numbers["folder_true"]["base"]["fingerprint"] is not None
    assert "New in this model, so without a start to compare with: classifier.bias, classifier.weight" in " ".join(
        numbers["folder_true"]["notes"]
    )
    assert "read_base=false" in said
    alone = numbers["folder_false"]["changes"]
    assert {n: c["rank"] for n, c in alone.items()} == {n: numbers["folder_true"]["changes"][n]["rank"] for n in alone}


def test_what_trained_in_place_is_compared_with_the_bases_own_files(tmp_path, bert_folder):
    rows = [{"text": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", "data.train_files=texts.jsonl", "data.batch_size=4", "method=full"]
    run(f"model.name_or_path={bert_folder}", "trainer.max_epochs=1", "hydra.run.dir=run", *data, cwd=tmp_path)
    run("inspect", "run/adapter", "to=page", cwd=tmp_path)
    found = json.loads((tmp_path / "page" / "inspect.json").read_text())["changes"]
    trained, start = (
        load_file(f) for f in (tmp_path / "run/adapter/adapter_model.safetensors", bert_folder / "model.safetensors")
    )
    name = "encoder.layer.0.output.dense"
    ((own, before),) = [
        (trained[k].double(), start[b].double())
        for k in trained
        for b in start
        if k.endswith(f"{name}.weight") and b.endswith(f"{name}.weight")
    ]
    assert found[f"bert.{name}"]["norm"] == pytest.approx(float((own - before).norm()), rel=1e-5)
    assert found[f"bert.{name}"]["norm"] > 0
    assert not any(k.startswith("classifier") for k in found)


def test_what_was_enlarged_before_it_trained_has_no_start_and_is_told_so(tmp_path, bert_folder):
    task = task_from_config({"name": "embedding", "loss_type": "ranking"})
    model = BaseModel(str(bert_folder)).load(task)
    model.resize_token_embeddings(model.config.vocab_size + 7)
    adapter = adapt(model, Selective(keep_originals=False))
    adapter.save(tmp_path / "adapter", task=task.to_config(), model={"name_or_path": str(bert_folder)})
    found = inspected(str(tmp_path / "adapter"), check_base=False)
    (note,) = [note for note in found.notes if "Of another shape than in the base" in note]
    assert note.endswith("compare with: embeddings.word_embeddings.weight")
    assert "embeddings.word_embeddings" not in {change.name for change in found.changes}
    assert len(found.changes) > 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=nowhere"], "nowhere: there is no such checkpoint or folder"),
        (["adapter=empty"], "empty holds no adapter"),
        (["adapter=adapter", "base=x", "read_base=false"], "read_base=false leaves the base out"),
        (["adapter=adapter", "to=taken"], "inspect.html exists; choose another folder"),
        ([], "inspect needs adapter=..."),
        (["adapter=adapter", "tos=x"], "'tos'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, foreign, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inspect.html").write_text("mine")
    failed = run("inspect", *words, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "taken" / "inspect.html").read_text() == "mine"


def test_numbers_that_are_not_finite_are_refused(tmp_path, foreign):
    from safetensors.torch import save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)
    failed = run("inspect", "adapter=adapter", cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert re.search("has NaN or infinite values in base_model", failed.stderr)


def test_a_checkpoint_of_ones_own_module_is_told_without_its_base(tmp_path, trainer):
    import lightning as L
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

        def training_step(self, batch, batch_idx):
            return self.backbone(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    callback = PeftCallback(LoRA(r=2, lora_alpha=6, target_modules=["0", "1"]), model="backbone")
    module, run_ = Own(), trainer(callback)
    run_.fit(module, DataLoader(TensorDataset(torch.randn(8, 8)), 4))
    run_.save_checkpoint(tmp_path / "own.ckpt")
    said = run("inspect", "adapter=own.ckpt", "to=page", cwd=tmp_path).stdout
    assert "LightningModule of your own" in " ".join(said.split())
    found = json.loads((tmp_path / "page" / "inspect.json").read_text())
    for place, layer in callback.adapter(module).tree.layers_by_module.items():
        delta = layer.deltas(module.backbone.get_submodule(place))["weight"].detach()
        assert found["changes"][place]["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_a_method_that_changes_no_weight_shows_its_own_matrices_without_a_base(tmp_path, build):
    adapter = adapt(build("bert"), BottleneckAdapter(reduction_factor=4))
    adapter.save(tmp_path / "bottleneck")
    said = run("inspect", "adapter=bottleneck", "to=page", cwd=tmp_path).stdout
    assert "BottleneckAdapter changes no weight of the base" in " ".join(said.split())
    found = json.loads((tmp_path / "page" / "inspect.json").read_text())
    matrices = {n: t for n, t in adapter.state_dict().items() if t.dim() > 1}
    assert found["own_matrices"].keys() == matrices.keys()
    for name, tensor in matrices.items():
        assert found["own_matrices"][name]["norm"] == pytest.approx(float(tensor.norm()), rel=1e-5)
