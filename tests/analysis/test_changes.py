"""What is said of an adapter's changes is what merging does to the weights, taken apart in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import LoRA, adapt
from lightning_peft.analysis.change import changes_of, own_matrices
from lightning_peft.analysis.inspection import Inspection, capacity_line, kinds, relative, shared_prefix
from lightning_peft.analysis.inspection_page import NUMBERS, PAGE, heat_map, write_inspection_page
from lightning_peft.analysis.inspection_report import broken, sparks
from lightning_peft.analysis.stored_factors import no_factors, stored_factors
from lightning_peft.formats.folder import read_folder
from lightning_peft.formats.tensor_file import Entry, read_tensors
from tests.method_table import TABLE, shown_data

# one model for each method: the invariants run over all of them
MERGEABLE = [(row, row.models[0]) for row in TABLE if row.mergeable]
# merged weights are rounded to float32, as the products are
ROUNDED = {"rtol": 2e-4, "atol": 1e-5}


@pytest.mark.parametrize(("row", "name"), MERGEABLE, ids=[f"{r.name}-{n}" for r, n in MERGEABLE])
def test_norms_and_singular_values_are_those_of_what_merging_changes(build, perturb, row, name):
    model = build(name)
    adapter = shown_data(adapt(model, row.make()))
    perturb(adapter)
    found = {c.name: c for c in changes_of(model)}
    before = {n: p.detach().double().clone() for n, p in model.named_parameters() if not n.startswith("adapters.")}
    before |= {n: t.double() for n, t in (adapter.tree.record.originals or {}).items()}
    kept = copy.deepcopy(model)
    lp.Adapter(kept).merge_and_unload() if adapter.tree.layers_by_module else None
    after = dict(kept.named_parameters())
    seen = 0
    for key, weight in before.items():
        delta, short = after[key].detach().double() - weight, key.removesuffix(".weight")
        if weight.dim() == 3 and name == "moe":
            matrices = {f"{short}[{i}]": (delta[i], weight[i]) for i in range(len(weight))}
        else:
            matrices = {short: (delta.flatten(1) if delta.dim() > 2 else delta, weight)}
        for called, (d, w) in matrices.items():
            if called not in found:
                assert not d.any(), f"{called} changes and is not told"
                continue
            seen += 1
            change = found[called]
            torch.testing.assert_close(change.norm, float(d.norm()), **ROUNDED)
            torch.testing.assert_close(change.weight_norm, float(w.norm()), rtol=1e-5, atol=0)
            if d.dim() == 2:
                values = torch.linalg.svdvals(d)[: len(change.values)]
                torch.testing.assert_close(torch.tensor(change.values).double(), values, **ROUNDED)
    assert seen == len(found) > 0


def test_looking_changes_nothing(build, perturb, call):
    model = build("bert")
    perturb(adapt(model, LoRA(r=4, use_dora=True, modules_to_save=["classifier"])))
    state, said = {n: p.clone() for n, p in model.named_parameters()}, call(model, "bert")
    changes_of(model)
    assert torch.equal(call(model, "bert"), said)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_unused_rank_is_told():
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 5))
    adapter = adapt(model, LoRA(r=4, target_modules=["0", "1"]))
    with torch.no_grad():
        adapter.tree.layers_by_module["0"].lora_B[:, :2].normal_()
        adapter.tree.layers_by_module["1"].lora_B[:, 0].normal_()
    first, second = changes_of(model)
    assert (first.rank, first.capacity, second.rank, second.capacity) == (2, 4, 1, 4)
    assert second.effective_rank == pytest.approx(1)
    said = capacity_line([first, second])
    assert (
        said
        == "99% of the squared norm needs a rank of 1 to 2 of 4 (3 of 8 directions, 5 unused); r=2 would do everywhere"
    )
    whole = [(c.norm, c.weight_norm) for c in (first, second)]
    expected = (sum(n**2 for n, _ in whole) / sum(w**2 for _, w in whole)) ** 0.5
    assert relative([first, second]) == pytest.approx(expected)


def test_methods_that_change_no_weight_show_their_own_matrices(build):
    model = build("bert")
    adapt(model, lp.BottleneckAdapter(reduction_factor=4))
    assert changes_of(model) == []
    found = {c.name: c for c in own_matrices(model)}
    named = {n: p for n, p in model.adapters["default"].named_parameters() if p.dim() == 2}
    assert named.keys() == found.keys()
    for name, parameter in named.items():
        change = found[name]
        torch.testing.assert_close(change.values, tuple(torch.linalg.svdvals(parameter.double()).tolist()))
        assert change.weight_norm is None


def test_a_merged_adapter_is_no_change_any_more(build):
    model = build("bert")
    adapt(model, LoRA(r=2)).merge()
    with pytest.raises(ValueError, match="is merged; unmerge"):
        changes_of(model)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=4, lora_alpha=6, use_rslora=True),
        LoRA(r=4, rank_pattern={r"\S*layer.0.\S*": 2}, alpha_pattern={"key": 3}),
        LoRA(r=4, init_lora_weights="pissa"),
        LoRA(r=2, target_modules=r".*(word_embeddings|query)"),
    ],
    ids=["rslora", "patterns", "pissa", "embedding"],
)
def test_a_file_tells_the_changes_without_its_base(build, perturb, tmp_path, method):
    model = build("bert")
    adapter = adapt(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    saved = read_folder(tmp_path / "adapter")
    found = stored_factors(saved.method, read_tensors(tmp_path / "adapter"))
    changes = {c.name: c for c in changes_of(model) if c.name.rpartition(".")[2] != "classifier"}
    assert {f.place for f in found} == changes.keys()
    for pair in found:
        a, b = pair.product
        torch.testing.assert_close(float((b @ a).norm()), changes[pair.place].norm, rtol=1e-6, atol=0)


def test_a_file_of_torchs_attention_tells_both_pairs(build, perturb, tmp_path):
    model = build("encoder")
    adapter = adapt(model, LoRA(r=4, target_modules=r".*self_attn", alpha_pattern={"layers.1.self_attn": 3}))
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    found = {f.place: f for f in stored_factors(adapter.method, read_tensors(tmp_path / "adapter"))}
    for change in changes_of(model):
        pair = found[change.name.removesuffix(".in_proj_weight")]
        a, b = pair.product
        torch.testing.assert_close(float((b @ a).norm()), change.norm, rtol=1e-6, atol=0)
        assert pair.owner.endswith("self_attn")


def test_factors_without_their_other_half_are_named():
    with pytest.raises(ValueError, match=r"q\.lora_A\.weight has no base_model\.model\.q\.lora_B\.weight beside it"):
        stored_factors(LoRA(), {"base_model.model.q.lora_A.weight": torch.ones(2, 3)})
    wrong = {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=r"has 2 rows, but q\.lora_B 4 columns"):
        stored_factors(LoRA(), wrong)
    with pytest.raises(ValueError, match="holds no lora_A"):
        stored_factors(LoRA(), {"classifier.weight": torch.ones(2, 3)})
    assert "IA3 is no LoRA" in str(no_factors(lp.IA3()))


def _inspection(changes, **more):
    entries = {"<b>x</b>": Entry((2, 3), torch.float32)}
    return Inspection("<script>", "LoRA", {"r": 4}, {"name": "<i>", "fingerprint": None}, entries, 24, changes, **more)


def test_the_page_stands_alone_and_escapes_what_files_say(build, perturb, tmp_path):
    model = build("bert")
    perturb(adapt(model, LoRA(r=4)))
    page = write_inspection_page(_inspection(tuple(changes_of(model)), notes=("<u>",)), tmp_path / "to").read_text()
    assert not [tag for tag in ("<script>", "<i>", "<b>", "<u>", "http", " src=") if tag in page]
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    found = json.loads((tmp_path / "to" / NUMBERS).read_text())
    assert found["changes"].keys() == {c.name for c in changes_of(model)}
    assert found["parameters"] == 6
    with pytest.raises(FileExistsError, match=rf"{PAGE} exists"):
        write_inspection_page(_inspection(()), tmp_path / "to")


def test_the_heat_map_has_layers_by_kinds_of_modules(build, perturb):
    model = build("t5")
    perturb(adapt(model, LoRA(r=2)))
    changes = changes_of(model)
    heat = heat_map(changes)
    assert [name for name, _ in heat.rows] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    assert max(cell[1] for _, cells in heat.rows for cell in cells if cell) == 1
    most = max(changes, key=lambda c: c.relative)
    (strongest,) = [cell for _, cells in heat.rows for cell in cells if cell and cell[1] == 1]
    assert strongest[2].startswith(most.name)
    assert any(cell is None for _, cells in heat.rows for cell in cells), "the encoder attends to nothing else"
    assert sum(len(kind.changes) for kind in kinds(changes)) == len(changes)


def test_the_heat_map_has_rows_for_what_lies_outside_of_layers(build, perturb, tmp_path):
    model = build("llama")
    perturb(adapt(model, LoRA(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])))
    changes = changes_of(model)
    heat = heat_map(changes)
    assert [name for name, _ in heat.outside] == ["model.embed_tokens", "lm_head"]
    assert (
        max(cell.strength for cell in (*dict(heat.outside).values(), *(c for _, cells in heat.rows for c in cells)))
        == 1
    )
    page = write_inspection_page(_inspection(tuple(changes)), tmp_path).read_text()
    assert page.count('<td colspan="1"') == 2


def test_a_weight_of_zeros_outside_of_layers_leaves_the_map_relative(build, perturb):
    model = build("llama")
    perturb(adapt(model, LoRA(r=2, target_modules=["q_proj", "lm_head"])))
    plain = heat_map([c for c in changes_of(model) if c.layer])
    with torch.no_grad():
        model.lm_head.base_layer.weight.zero_() if hasattr(
            model.lm_head, "base_layer"
        ) else model.lm_head.weight.zero_()
    heat = heat_map(changes_of(model))
    assert (heat.rows, heat.outside) == (plain.rows, ())


def test_full_changes_have_no_rank_to_leave_unused(build, perturb):
    model = build("bert")
    perturb(adapt(model, lp.IA3()))
    found = changes_of(model)
    assert not any(c.factored or c.to_dict()["unused"] is not None for c in found)
    assert "unused" not in capacity_line(found)


def test_short_forms():
    assert broken("layers.0.mlp.up_proj", 80) == "layers.0.mlp.up_proj"
    assert broken("layers.0.mlp.up_proj", 13) == "layers.0.mlp.\n  up_proj"
    assert sparks([8.0, 4.0, 0.0]) == "█▅▁"
    assert sparks([2.0] * 20) == "█" * 7
    assert sparks([0.0]) == ""
    assert shared_prefix(["a.b.c", "a.b.d", "a.b2.c"]) == "a."
    assert shared_prefix(["a.b"]) == ""
