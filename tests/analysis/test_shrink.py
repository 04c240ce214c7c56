"""A LoRA of a smaller rank is the nearest one to what it was, here and in peft."""

from __future__ import annotations

import json

import pytest
import torch

import lightning_peft as lp
from lightning_peft import LoRA, adapt, load_adapter
from lightning_peft.analysis.shrink import kept_in_all, shrink
from lightning_peft.formats.folder import MANIFEST, PEFT_CONFIG, read_folder
from lightning_peft.formats.tensor_file import TENSORS

# factors are stored in float32
ROUNDED = {"rtol": 1e-4, "atol": 1e-6}

METHODS = {
    "plain": ("bert", LoRA(r=8, lora_alpha=6)),
    "rslora": ("gpt2", LoRA(r=8, lora_alpha=6, use_rslora=True)),
    "patterns": ("bert", LoRA(r=8, rank_pattern={r"\S*layer.0.\S*": 2}, alpha_pattern={"key": 3})),
    "pissa": ("bert", LoRA(r=4, lora_alpha=6, init_lora_weights="pissa")),
    "fixed_a": ("bert", LoRA(r=8, lora_fa=True)),
    "biases": ("bert", LoRA(r=8, bias="all")),
    "b_bias": ("bert", LoRA(r=8, lora_alpha=6, lora_bias=True)),
    "tokens": ("llama", LoRA(r=8, trainable_token_indices=[14, 50])),
    "embedding": ("bert", LoRA(r=8, target_modules=r".*(word_embeddings|query)", modules_to_save=["classifier"])),
    "convolutions": ("convnet", LoRA(r=6, target_modules=["conv1", "conv2"])),
    "attention": ("encoder", LoRA(r=8, target_modules=r".*(self_attn|linear1)")),
}


def _saved(build, perturb, folder, name, method):
    """An adapter that was moved from its start, saved, with what it adds to the weights."""
    model = build(name)
    adapter = adapt(model, method)
    perturb(adapter)
    adapter.save(folder)
    return _deltas(model)


def _deltas(model):
    found = {}
    for place, layer in lp.Adapter(model).tree.layers_by_module.items():
        for key, delta in layer.deltas(model.get_submodule(place)).items():
            found[f"{place}.{key}"] = delta.detach().double().clone()
    return found


def _nearest(delta, rank):
    """The nearest matrix of a rank, by a decomposition of the full one."""
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(delta)


@pytest.mark.parametrize(("name", "method"), METHODS.values(), ids=METHODS)
def test_what_is_loaded_again_is_the_nearest_change_of_that_rank(build, perturb, tmp_path, name, method):
    before = _saved(build, perturb, tmp_path / "adapter", name, method)
    told = {c.place: c for c in shrink(tmp_path / "adapter", tmp_path / "small", r=3)}
    model = build(name)
    loaded = load_adapter(model, tmp_path / "small")
    after = _deltas(model)
    assert after.keys() == before.keys()
    squared = kept = 0.0
    for key, delta in before.items():
        place = key.rpartition(".")[0] if key.endswith(("weight", "bias")) else key.removesuffix(".in_proj_weight")
        if place not in told or delta.dim() < 2:
            torch.testing.assert_close(after[key], delta, rtol=0, atol=0)
            continue
        cut = _nearest(delta, 3)
        torch.testing.assert_close(after[key], cut, **ROUNDED)
        assert told[place].rank == min(3, told[place].before)
        squared, kept = squared + float(delta.norm() ** 2), kept + float(cut.norm() ** 2)
        assert told[place].kept == pytest.approx(float((cut.norm() / delta.norm()) ** 2), rel=1e-5)
    assert kept_in_all(list(told.values())) == pytest.approx(kept / squared, rel=1e-5)
    assert loaded.method.r == 3
    assert (loaded.method.lora_fa, loaded.method.bias) == (method.lora_fa, method.bias)


def test_each_module_gets_as_little_rank_as_keeps_the_share(build, perturb, tmp_path):
    before = _saved(build, perturb, tmp_path / "adapter", "bert", LoRA(r=8, lora_alpha=6))
    told = shrink(tmp_path / "adapter", tmp_path / "small", energy=0.9)
    assert len({c.rank for c in told}) > 1, "else this shows nothing"
    for change in told:
        squares = torch.linalg.svdvals(before[f"{change.place}.weight"]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert change.rank == int((shares < 0.9).sum()) + 1
        assert change.kept >= 0.9
    model = build("bert")
    load_adapter(model, tmp_path / "small")
    for change in told:
        torch.testing.assert_close(
            _deltas(model)[f"{change.place}.weight"], _nearest(before[f"{change.place}.weight"], change.rank), **ROUNDED
        )


def test_both_projections_of_torchs_attention_share_the_larger_rank(build, perturb, tmp_path):
    _saved(build, perturb, tmp_path / "adapter", "encoder", LoRA(r=8, target_modules=r".*self_attn"))
    told = {c.place: c for c in shrink(tmp_path / "adapter", tmp_path / "small", energy=0.8)}
    for place in ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"):
        assert told[place].rank == told[f"{place}.out_proj"].rank
        assert min(told[place].kept, told[f"{place}.out_proj"].kept) >= 0.8
    load_adapter(build("encoder"), tmp_path / "small")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("how", [{"r": 3}, {"energy": 0.9}])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_same_and_what_peft_wrote_is_shrunk(build, tmp_path, how, rslora):
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=12, use_rslora=rslora, target_modules=["query", "dense"])
    generator = torch.Generator().manual_seed(0)
    theirs = peft.get_peft_model(build("bert"), config)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=generator) * torch.tensor([1, 1, 0.5, 0.4, 0.3, 0.1, 0, 0]))
    theirs.save_pretrained(tmp_path / "adapter")
    told = {c.place: c for c in shrink(tmp_path / "adapter", tmp_path / "small", **how)}
    small = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "small")
    assert not (tmp_path / "small" / MANIFEST).exists()
    whole = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    again = {n: m for n, m in small.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert whole.keys() == again.keys() == told.keys()
    for name, layer in whole.items():
        delta = layer.get_delta_weight("default").detach().double()
        cut = _nearest(delta, told[name].rank)
        torch.testing.assert_close(again[name].get_delta_weight("default").detach().double(), cut, **ROUNDED)
        assert again[name].r["default"] == told[name].rank


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_loads_what_ours_became(build, perturb, tmp_path):
    import peft

    _saved(build, perturb, tmp_path / "adapter", "bert", LoRA(r=8, lora_alpha=6, init_lora_weights="pissa"))
    shrink(tmp_path / "adapter", tmp_path / "small", energy=0.9)
    model = build("bert")
    load_adapter(model, tmp_path / "small")
    mine = _deltas(model)
    small = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "small")
    layers = {n: m for n, m in small.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert {f"{n}.weight" for n in layers} == mine.keys()
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        torch.testing.assert_close(delta, mine[f"{name}.weight"], **ROUNDED)


def test_a_dora_keeps_the_lengths_of_its_rows(build, perturb, tmp_path):
    model = build("bert")
    adapter = adapt(model, LoRA(r=8, use_dora=True))
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    told = {c.place: c for c in shrink(tmp_path / "adapter", tmp_path / "small", r=2)}
    small = build("bert")
    load_adapter(small, tmp_path / "small")
    lengths = {n: layer.lora_magnitude_vector.detach() for n, layer in adapter.tree.layers_by_module.items()}
    merged = [lp.Adapter(m).merge_and_unload() for m in (model, small)]
    for place, m in lengths.items():
        if place not in told:
            continue
        rows = [x.get_submodule(place).weight.detach() for x in merged]
        for weight in rows:
            torch.testing.assert_close(weight.norm(dim=1), m.abs(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(*rows)


def test_nothing_is_lost_of_a_change_that_used_no_more(build, call, tmp_path):
    model = build("llama")
    adapter = adapt(model, LoRA(r=8, lora_alpha=16))
    with torch.no_grad():
        for layer in adapter.tree.layers_by_module.values():
            layer.lora_B[:, :2].normal_(std=0.05)
    adapter.save(tmp_path / "adapter")
    told = shrink(tmp_path / "adapter", tmp_path / "small", energy=0.999999)
    assert {c.rank for c in told} <= {1, 2}
    small = build("llama")
    load_adapter(small, tmp_path / "small")
    # the sums of two factors in place of eight are rounded elsewhere
    torch.testing.assert_close(call(small, "llama"), call(model, "llama"), rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    again = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert {k for k in saved if saved[k] != again[k]} == {"method", "tensors"}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lp.IA3(), "an IA3: IA3 is no LoRA"),
        (lp.LoHa(r=2), "a LoHa: LoHa is no LoRA"),
        (lp.AdaLoRA(target_r=2, init_r=4), "an AdaLoRA"),
        (lp.BottleneckAdapter(reduction_factor=4), "a BottleneckAdapter"),
    ],
)
def test_other_methods_are_refused(build, tmp_path, method, said):
    adapt(build("bert"), method).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=said):
        shrink(tmp_path / "adapter", tmp_path / "small", r=1)
    assert not (tmp_path / "small").exists()


def test_stacks_of_experts_are_refused(build, tmp_path):
    adapt(build("moe"), LoRA(r=4, target_parameters=["experts.down_proj"])).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="target_parameters"):
        shrink(tmp_path / "adapter", tmp_path / "small", r=1)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, "one of r .* and energy .* is to be given, not none"),
        ({"r": 2, "energy": 0.9}, "not both"),
        ({"r": 0}, "r must be a whole number of 1 or more, but got 0"),
        ({"r": True}, "r must be a whole number"),
        ({"energy": 1}, "energy must lie between 0 and 1, but got 1"),
        ({"energy": "0.9"}, "energy must lie between 0 and 1, but got '0.9'"),
        ({"r": 4}, "r=4 takes nothing away from ranks of up to 4"),
    ],
)
def test_numbers_out_of_range_are_refused(build, perturb, tmp_path, numbers, said):
    _saved(build, perturb, tmp_path / "adapter", "bert", LoRA(r=4))
    with pytest.raises(ValueError, match=said):
        shrink(tmp_path / "adapter", tmp_path / "small", **numbers)
    assert not (tmp_path / "small").exists()


def test_no_folder_that_holds_something_is_written_into(build, perturb, tmp_path):
    _saved(build, perturb, tmp_path / "adapter", "bert", LoRA(r=4))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "tokenizer.json").write_text("mine")
    for target in ("small", "adapter"):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            shrink(tmp_path / "adapter", tmp_path / target, r=2)
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "mine"


def test_the_tokenizer_goes_along_and_what_speaks_of_the_old_rank_does_not(build, perturb, tmp_path):
    _saved(build, perturb, tmp_path / "adapter", "bert", LoRA(r=4))
    for name in ("tokenizer.json", "chat_template.jinja", "trainer_state.json", "training_args.bin"):
        (tmp_path / "adapter" / name).write_text("{}")
    shrink(tmp_path / "adapter", tmp_path / "small", r=2)
    there = {p.name for p in (tmp_path / "small").iterdir()}
    assert there == {TENSORS, MANIFEST, PEFT_CONFIG, "tokenizer.json", "chat_template.jinja"}
    assert read_folder(tmp_path / "small").method.lora_alpha == 8
