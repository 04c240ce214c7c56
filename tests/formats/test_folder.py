"""Adapter folders: whole or not at all, and strict when they are read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import Adapter, LoRA, Selective, adapt, load_adapter
from lightning_peft.formats.merged import save_merged


@pytest.fixture
def saved(build, tmp_path):
    adapter = adapt(build("bert"), LoRA(r=2))
    return adapter.save(tmp_path / "a")


def test_a_folder_that_holds_an_adapter_is_not_written_into(build, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        adapt(build("bert"), LoRA(r=4)).save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "short"])
def test_a_damaged_file_is_refused_and_the_model_is_left_as_it_was(build, saved, damage, call):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    said = {"missing": "1 missing, such as", "unexpected": "1 unexpected, such as more", "shape": r"expected \(2, 32\)"}
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["more"] = torch.ones(1)
    elif damage == "shape":
        tensors[first] = torch.ones(3, 32)
    save_file(tensors, path)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    model = build("bert")
    base = call(model, "bert")
    with pytest.raises(ValueError, match=said.get(damage, "may be cut short")):
        load_adapter(model, saved)
    assert not hasattr(model, "adapters")
    assert torch.equal(call(model, "bert"), base)


def test_a_failed_load_leaves_the_adapters_that_were_there_active(build, saved, call, perturb):
    model = build("bert", seed=1)
    perturb(adapt(model, LoRA(r=3), "first"))
    adapted = call(model, "bert")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(model, saved, "second")
    assert torch.equal(call(model, "bert"), adapted)


def test_another_base_is_refused_unless_told(build, saved):
    with pytest.raises(ValueError, match=r"was trained on another base: fingerprint"):
        load_adapter(build("bert", seed=1), saved)
    load_adapter(build("bert", seed=1), saved, check_base=False)
    with pytest.raises(ValueError, match=r"matches no module|another base"):
        load_adapter(build("gpt2"), saved)


def test_the_same_base_in_bfloat16_is_the_same_base(build, saved):
    load_adapter(build("bert").bfloat16(), saved)


def test_a_folder_without_an_adapter_says_what_is_there(build, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter .* there is: \['notes.txt'\]"):
        load_adapter(build("bert"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"config": {}}')
    with pytest.raises(ValueError, match="names no peft_type"):
        load_adapter(build("bert"), tmp_path)


def test_the_files_are_the_same_bytes_each_time_and_list_every_tensor(build, tmp_path):
    folders = []
    for name in "ab":
        torch.manual_seed(0)
        folders.append(adapt(build("bert"), LoRA(r=2)).save(tmp_path / name))
    for file in ("adapter_config.json", "lightning_peft.json", "adapter_model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    manifest = json.loads((folders[0] / "lightning_peft.json").read_text())
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    assert manifest["tensors"] == {k: list(t.shape) for k, t in tensors.items()}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", LoRA(r=2, modules_to_save=["classifier"])),
        ("llama", LoRA(r=2)),
        ("gpt2", LoRA(r=2, target_modules=["wte", "c_attn"])),
        ("gpt2", LoRA(r=2)),
        ("t5", LoRA(r=2)),
        ("bert", Selective(parameter_types=["bias"])),
    ],
)
def test_plain_transformers_loads_the_merged_model(build, call, perturb, tmp_path, name, method):
    model = build(name)
    perturb(adapt(model, method))
    expected = call(model, name)
    save_merged(model, "default", tmp_path / "merged")
    assert torch.equal(call(model, name), expected)
    plain = type(build(name)).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(call(plain, name), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError, match="already holds files"):
        save_merged(model, "default", tmp_path / "merged")


@pytest.mark.parametrize("file", ["lightning_peft.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON, it may be cut short: Expecting property name"),
        ("", "is no JSON, it may be cut short"),
        ("[]", "must hold a JSON object, but holds a list"),
        ("\xff", "is no JSON"),
    ],
)
def test_a_damaged_description_names_the_file_and_what_is_wrong(build, saved, file, content, said):
    if file == "adapter_config.json":
        (saved / "lightning_peft.json").unlink()
    (saved / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"a/{file} {said}"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": None, "base": None}, r"a/lightning_peft.json has no method, base, or something else there"),
        ({"copies": "x"}, r"a/lightning_peft.json has no copies"),
        ({"method": {}}, r"a/lightning_peft.json: method '' is unknown"),
        ({"method": {"_target_": "lightning_peft.LoRA", "r": "8"}}, r"a/lightning_peft.json: LoRA: r must be a whole"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused_by_key(build, saved, change, said):
    path = saved / "lightning_peft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        load_adapter(build("bert"), saved)


def test_a_foreign_configuration_that_is_refused_is_named(build, saved):
    (saved / "lightning_peft.json").unlink()
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a/adapter_config.json: it names no peft_type"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_tensors_name(build, saved, value):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, *_ = sorted(tensors)
    tensors[first][0, 0] = tensors[second][0, 0] = value
    save_file(tensors, path)
    model = build("bert")
    with pytest.raises(ValueError, match=rf"has NaN or infinite values in {first} and in 1 more tensors"):
        load_adapter(model, saved, check_base=False)
    assert not hasattr(model, "adapters")


def test_a_file_where_a_folder_is_meant_is_told_apart(build, saved, tmp_path):
    file = saved / "adapter_model.safetensors"
    with pytest.raises(NotADirectoryError, match=r"adapter_model.safetensors is a file, but an adapter is a folder"):
        load_adapter(build("bert"), file)
    adapter = adapt(build("bert"), LoRA(r=2))
    for path in (file, file / "below"):
        with pytest.raises(FileExistsError, match=rf"^{path} cannot be a folder, for {file} is a file"):
            adapter.save(path)
        with pytest.raises(FileExistsError, match="cannot be a folder"):
            save_merged(adapter.model, "default", path)


def test_an_adapter_is_not_saved_beside_a_models_weights(build, tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    before = sorted(p.name for p in (tmp_path / "base").iterdir())
    with pytest.raises(FileExistsError, match=r"base holds a model \(config.json, model.safetensors\)"):
        adapt(model, LoRA(r=2)).save(tmp_path / "base")
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("x")
    with pytest.warns(UserWarning, match=r"notes/README.md was there before and is kept"):
        folder = adapt(build("bert"), LoRA(r=2)).save(tmp_path / "notes")
    load_adapter(build("bert"), folder)


def test_what_differs_in_another_base_is_named(build, saved):
    changed = build("bert")
    with torch.no_grad():
        changed.bert.encoder.layer[1].output.dense.weight[3, 5] += 0.1
    with pytest.raises(ValueError, match=r"values do not in bert.encoder.layer.1: load .*; check_base=False loads it"):
        load_adapter(changed, saved)
    with pytest.raises(ValueError, match=r"values do not.*, which was float32 there and is float16 here"):
        load_adapter(build("bert").half(), saved)
    load_adapter(changed, saved, check_base=False)


@torch.no_grad()
def test_a_vocabulary_that_was_enlarged_is_recorded_and_the_line_to_write_is_said(build, call, perturb, tmp_path):
    model = build("llama")
    model.resize_token_embeddings(101)
    perturb(adapt(model, LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"])))
    folder = Adapter(model).save(tmp_path / "a")
    assert json.loads((folder / "lightning_peft.json").read_text())["base"]["vocabulary"] == 101
    fresh = build("llama")
    with pytest.raises(ValueError, match=r"of 101 tokens, .* has 97: write model.resize_token_embeddings\(101\)"):
        load_adapter(fresh, folder)
    assert not hasattr(fresh, "adapters")
    fresh.resize_token_embeddings(101)
    load_adapter(fresh, folder)
    torch.testing.assert_close(call(fresh, "llama"), call(model, "llama"), rtol=0, atol=0)


def test_a_base_that_cannot_be_compared_as_a_whole_is_told_of_and_what_is_known_of_it_decides(build, saved):
    def offloaded(seed=0):
        model = build("bert", seed=seed)
        part = model.bert.encoder.layer[1].output.dense
        part.weight = torch.nn.Parameter(torch.empty_like(part.weight, device="meta"))
        return model

    with pytest.warns(UserWarning, match=r"a was trained on a base of which not all is compared .*: this model has"):
        load_adapter(offloaded(), saved)
    other = offloaded(seed=1)
    with pytest.raises(
        ValueError, match=r"on another base: other values or shapes in bert.embeddings.*check_base=False"
    ):
        load_adapter(other, saved)
    assert not hasattr(other, "adapters")
    # a file that says nothing of its base's values
    path = saved / "lightning_peft.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["fingerprint"] = None
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="on another base: other values or shapes in"):
        load_adapter(build("bert", seed=1), saved)
    manifest["base"]["parts"] = {}
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="of which not all is compared .*: the model that it was saved from had"):
        load_adapter(build("bert", seed=1), saved)
    load_adapter(build("bert", seed=1), saved, check_base=False)
