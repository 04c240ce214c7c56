"""Combining LoRA adapters, each way against its formula written plainly in float64, and against peft."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from torch import nn

from lightning_peft import IA3, Adapter, LoRA, active_adapters, adapt, combine, load_adapter
from lightning_peft.core.saved_module import SavedModule
from lightning_peft.methods.lora_combine import COMBINATIONS, dropped, elected_mean, factored, trimmed

NAMES = ["a", "b", "c"]
WEIGHTS = [0.7, -0.4, 1.3]
METHODS = [
    LoRA(r=2, lora_alpha=3),
    LoRA(r=5, lora_alpha=7, use_rslora=True),
    LoRA(r=3, lora_alpha=9, rank_pattern={"k_proj": 4}, alpha_pattern={"q_proj": 2}),
]


def adapted(model, methods, perturb):
    for name, by, method in zip(NAMES, (0.3, 0.2, 0.1), methods, strict=False):
        perturb(adapt(model, method, name), by)
    return model


def changes(model, name):
    """The change of each adapted weight, ``s B A``, in float64."""
    tree = Adapter(model, name).tree
    found = {}
    for place, layer in tree.layers_by_module.items():
        if not isinstance(layer, SavedModule):
            a, b = layer.lora_A.double(), layer.lora_B.double()
            found[place] = layer.scale * b.flatten(1) @ a.flatten(1)
            if "lora_A0" in layer._buffers:
                found[place] = found[place] - layer.scale * layer.lora_B0.double() @ layer.lora_A0.double()
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for place in expected:
        # the factors are stored in float32
        torch.testing.assert_close(got[place], expected[place], rtol=1e-5, atol=1e-6)


def total(model, names=NAMES, weights=WEIGHTS):
    each = [changes(model, n) for n in names]
    return {p: sum(w * c[p] for w, c in zip(weights, each, strict=True)) for p in each[0]}


@torch.no_grad()
def test_cat_is_the_exact_weighted_sum_whatever_the_ranks_and_strengths(build, perturb, call):
    model = adapted(build("llama"), METHODS, perturb)
    before = {n: changes(model, n) for n in NAMES}
    adapter = combine(model, NAMES, WEIGHTS, "all")
    assert active_adapters(model) == ("all",)
    assert_same(changes(model, "all"), total(model))
    assert adapter.method.r == 2 + 5 + 4
    for name in NAMES:
        assert all(torch.equal(c, before[name][p]) for p, c in changes(model, name).items())
    # the whole model with the sum added to its weights
    plain = build("llama")
    for place, change in total(model).items():
        plain.get_submodule(place).weight += change.float()
    torch.testing.assert_close(call(model, "llama"), call(plain, "llama"), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cat_of_more_ranks_than_the_weight_has_stays_exact(build, perturb):
    methods = [LoRA(r=12, target_modules=["k_proj"]), LoRA(r=9, target_modules=["k_proj"])]
    model = adapted(build("llama"), methods, perturb)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert combine(model, ["a", "b"], [0.5, 2.0], "both").method.r == 16
    assert_same(changes(model, "both"), total(model, ["a", "b"], [0.5, 2.0]))


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 1, 3, 16])
def test_svd_is_the_best_approximation_of_the_sum_at_that_rank(build, perturb, rank):
    model = adapted(build("llama"), METHODS, perturb)
    combine(model, NAMES, WEIGHTS, "low", "svd", svd_rank=rank)
    expected = {}
    for place, change in total(model).items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        s[rank or 5 :] = 0  # the highest of the ranks 2, 5, and 3 or 4
        expected[place] = u @ torch.diag(s) @ v
    assert_same(changes(model, "low"), expected)


def paper_ties(vectors, weights, density):
    """TIES, Algorithm 1: trim, elect, disjoint mean, value by value."""
    kept = []
    for vector in vectors:
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        chosen = set(order[: int(density * len(vector))])
        kept.append([x if i in chosen else 0.0 for i, x in enumerate(vector)])
    merged = []
    for values in zip(*kept, strict=True):
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [w * x for w, x in zip(weights, values, strict=True) if x and math.copysign(1, x) == sign]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def test_ties_is_the_papers_algorithm():
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, 6, 7, dtype=torch.float64, generator=generator)
    for density in (0.2, 0.5, 1.0):
        for weights in ([1.0, 1.0, 1.0], [0.3, 2.0, -1.0]):
            sparse = torch.stack([trimmed(v, density, generator) for v in vectors])
            got = elected_mean(sparse, torch.tensor(weights, dtype=torch.float64))
            expected = paper_ties([v.flatten().tolist() for v in vectors], weights, density)
            torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64))
    opposite = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    assert elected_mean(opposite, ones).tolist() == [0.0, 1.5]


def test_dare_drops_at_random_and_keeps_the_mean():
    change = torch.full((400, 500), 2.0, dtype=torch.float64)
    sparse = dropped(change, 0.1, torch.Generator().manual_seed(0))
    assert set(sparse.unique().tolist()) == {0.0, 20.0}
    # 200,000 Bernoulli(0.1): the share's standard deviation is 0.0007, four of which make 0.056 of the mean
    assert abs(float(sparse.mean()) - 2.0) < 0.056
    assert torch.equal(sparse, dropped(change, 0.1, torch.Generator().manual_seed(0)))
    assert not torch.equal(sparse, dropped(change, 0.1, torch.Generator().manual_seed(1)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in COMBINATIONS if k.endswith("_svd")])
def test_sparse_ways_on_products_are_their_formula_on_the_changes(build, perturb, kind):
    model = adapted(build("llama"), METHODS, perturb)
    combine(model, NAMES, WEIGHTS, "new", kind, density=0.4, svd_rank=16, seed=5)
    each = [changes(model, n) for n in NAMES]
    generator = torch.Generator().manual_seed(5)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = {}
    for place in each[0]:
        stacked = torch.stack([c[place] for c in each])
        if kind.startswith("dare"):
            drawn = [torch.rand(stacked[0].shape, generator=generator, dtype=torch.float64) < 0.4 for _ in NAMES]
            stacked = stacked * torch.stack(drawn) / 0.4
        else:
            k = int(0.4 * stacked[0].numel())
            least = stacked.flatten(1).abs().topk(k).values[:, -1].view(-1, 1, 1)
            stacked = torch.where(stacked.abs() >= least, stacked, 0)
        if "ties" in kind:
            same = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
            merged = (weights.view(-1, 1, 1) * stacked * same).sum(0) / same.sum(0).clamp(min=1)
        else:
            merged = (weights.view(-1, 1, 1) * stacked).sum(0)
        u, s, v = torch.linalg.svd(merged, full_matrices=False)
        expected[place] = u[:, :16] @ torch.diag(s[:16]) @ v[:16]
    # trimming is a threshold on values that were multiplied in another order: none lies on it here
    assert_same(changes(model, "new"), expected)


@pytest.mark.filterwarnings("ignore")  # what peft and transformers warn of each other is not ours to mend
@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "cat", "ties", "magnitude_prune"])
def test_ways_on_factors_give_pefts_numbers(build, perturb, kind, tmp_path):
    options = {"density": 0.5} if kind in ("ties", "magnitude_prune") else {}
    methods = [LoRA(r=4, lora_alpha=6), LoRA(r=4, lora_alpha=10), LoRA(r=4, lora_alpha=4)]
    ours = adapted(build("gpt2"), methods, perturb)
    for name in NAMES:
        Adapter(ours, name).save(tmp_path / name)
    theirs = PeftModel.from_pretrained(build("gpt2"), tmp_path / "a", adapter_name="a")
    for name in NAMES[1:]:
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    combine(ours, NAMES, WEIGHTS, "new", kind, **options)
    theirs.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, **options)
    for place, change in changes(ours, "new").items():
        layer = theirs.base_model.model.get_submodule(place)
        a, b = layer.lora_A["new"].weight.double(), layer.lora_B["new"].weight.double()
        torch.testing.assert_close(change, layer.scaling["new"] * b @ a, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnet", "encoder", "embedding"])
def test_other_kinds_of_modules_are_combined_too(build, perturb, call, name):
    if name == "embedding":
        name, targets = "gpt2", ["wte"]
    else:
        targets = r".*(conv1|conv2|self_attn|linear1|head)"
    methods = [LoRA(r=2, lora_alpha=3, target_modules=targets), LoRA(r=1, lora_alpha=3, target_modules=targets)]
    model = adapted(build(name), methods, perturb)
    plain = build(name)
    for adapter, weight in (("a", 0.7), ("b", -0.4)):
        for place, layer in Adapter(model, adapter).tree.layers_by_module.items():
            module = plain.get_submodule(place)
            for key, delta in layer.deltas(module).items():
                owner, _, leaf = key.rpartition(".")
                target = module.get_submodule(owner)
                target._parameters[leaf] = nn.Parameter(target._parameters[leaf] + weight * delta)
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 3})):
        combine(model, ["a", "b"], [0.7, -0.4], kind, kind, **options)
        torch.testing.assert_close(call(model, name), call(plain, name), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_start_that_is_subtracted_is_combined_as_what_it_changes(build, perturb):
    methods = [LoRA(r=2, init_lora_weights="pissa"), LoRA(r=4)]
    model = adapted(build("llama"), methods, perturb)
    assert combine(model, ["a", "b"], [1.5, 0.5], "both").method.r == 2 * 2 + 4
    assert_same(changes(model, "both"), total(model, ["a", "b"], [1.5, 0.5]))


@torch.no_grad()
def test_copies_of_modules_are_combined_by_what_they_differ_from_the_base(build, perturb):
    method = LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = adapted(build("bert"), [method, method], perturb)
    base = model.classifier.weight.double()
    first, second = (Adapter(model, n).tree.get_parameter("classifier.weight").double() for n in ("a", "b"))
    for kind, density in (("cat", None), ("svd", None), ("linear", None), ("ties_svd", 1.0)):
        made = combine(model, ["a", "b"], [0.7, 0.6], kind, kind, density=density)
        one, other = first - base, second - base
        expected = base + 0.7 * one + 0.6 * other
        if kind == "ties_svd":
            sign = (one + other).sign()
            agree = torch.stack([one.sign() == sign, other.sign() == sign])
            expected = base + (torch.stack([0.7 * one, 0.6 * other]) * agree).sum(0) / agree.sum(0)
        torch.testing.assert_close(made.tree.get_parameter("classifier.weight").double(), expected, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore")  # what peft and transformers warn of each other is not ours to mend
@torch.no_grad()
def test_a_combined_adapter_is_saved_and_loaded_like_any_other(build, perturb, call, tmp_path):
    model = adapted(build("llama"), METHODS, perturb)
    combine(model, NAMES, WEIGHTS, "all").save(tmp_path / "all")
    fresh = build("llama")
    load_adapter(fresh, tmp_path / "all")
    assert torch.equal(call(fresh, "llama"), call(model, "llama"))
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path / "all")
    torch.testing.assert_close(call(theirs, "llama"), call(model, "llama"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((["a", "x"], [1, 1], "new"), {}, "has no adapter 'x'"),
        ((["a", "b"], [1, 1], "a"), {}, "already an adapter 'a'"),
        ((["a", "b"], [1], "new"), {}, "got 1 weights for 2 adapters"),
        (([], [], "new"), {}, "name at least one adapter"),
        ((["a"], [float("nan")], "new"), {}, "weights must be finite"),
        ((["a", "b"], [1, 1], "new", "tie"), {}, "'tie' is unknown; did you mean 'ties'"),
        ((["a", "b"], [1, 1], "new", "ties_svd"), {}, "needs a density above 0 and at most 1, but got None"),
        ((["a", "b"], [1, 1], "new", "dare_linear_svd"), {"density": 1.5}, "at most 1, but got 1.5"),
        ((["a", "b"], [1, 1], "new", "dare_linear_svd"), {"density": 0}, "above 0 and at most 1, but got 0"),
        ((["a", "b"], [1, 1], "new", "cat"), {"density": 0.5}, "'cat' keeps every value, so it takes no density"),
        ((["a", "b"], [1, 1], "new", "cat"), {"svd_rank": 2}, "takes no svd_rank"),
        ((["a", "b"], [1, 1], "new", "svd"), {"svd_rank": 0}, "svd_rank must be 1 or more"),
        (
            (["a", "b"], [1, 1], "new", "svd"),
            {"svd_rank": 99},
            "svd_rank=99 is above .*k_proj'; lower it to [0-9]+ or less",
        ),
        ((["a", "b"], ["1", 1], "new"), {}, "weights must be numbers, but got \\['1', 1\\]"),
        ((["a", "b"], [1, 1], "new", "nope"), {}, "combination_type 'nope' is unknown; known: cat, dare_linear, "),
        (
            (["a", "b"], [1, 1], "new", "linear"),
            {},
            r"the ranks differ \(2, 3\).*take 'cat', 'svd' or a name in '_svd'",
        ),
        ((["a", "c"], [1, 1], "new"), {}, "layers in different places; only 'a' has 'model.layers.0.mlp"),
        ((["a", "d"], [1, 1], "new"), {}, "'d' is a DoRA, whose lengths do not add up"),
        ((["a", "e"], [1, 1], "new"), {}, "works on LoRA adapters, but 'e' is an IA3"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_nothing_changes(build, arguments, options, said):
    model = build("llama")
    methods = (LoRA(r=2), LoRA(r=3), LoRA(r=2, target_modules=["q_proj"]), LoRA(r=2, use_dora=True), IA3())
    for name, method in zip("abcde", methods, strict=True):
        adapt(model, method, name)
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=said):
        combine(model, *arguments, **options)
    assert list(model.state_dict()) == state
    assert active_adapters(model) == ("e",)


def test_adapters_that_share_something_with_the_base_are_refused(build):
    model = build("gpt2")
    adapt(model, LoRA(r=2, bias="all"), "biased")
    adapt(model, LoRA(r=2), "plain").merge()
    adapt(model, LoRA(r=2, lora_bias=True), "b_bias")
    adapt(model, LoRA(r=2, trainable_token_indices=[3]), "rows")
    expected = {
        "biased": "of the base in place",
        "plain": "unmerge",
        "b_bias": "lora_bias=True",
        "rows": "trained token rows",
    }
    for name, said in expected.items():
        with pytest.raises(ValueError, match=rf"the adapter '{name}' is .*{said}"):
            combine(model, [name], [1.0], "new")


def test_factors_of_a_rank_beyond_the_matrix_are_filled_up_with_zeros():
    product = torch.randn(3, 4, dtype=torch.float64)
    a, b = factored(product, 5)
    assert (a.shape, b.shape) == ((5, 4), (3, 5))
    torch.testing.assert_close(b @ a, product)


@torch.no_grad()
def test_svd_of_one_adapter_is_that_adapter_whatever_its_alpha(perturb):
    model = adapted(nn.Sequential(nn.Linear(6, 6)), [LoRA(r=2, lora_alpha=8)], perturb)
    combine(model, ["a"], [1.0], "same", "svd")
    assert_same(changes(model, "same"), changes(model, "a"))
