"""LoRA's variants against the papers' formulas, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, MiSS, adapt


def _layer(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(12, 8)})
    adapter = adapt(model, LoRA(r=4, lora_alpha=6, **options))
    return model["linear"], adapter.tree.layers_by_module["linear"]


@torch.no_grad()
def test_dora_is_the_papers_formula():
    linear, layer = _layer(use_dora=True)
    layer.lora_B.normal_()
    layer.lora_magnitude_vector.mul_(1.3)
    direction = linear.weight + 1.5 * layer.lora_B @ layer.lora_A
    weight = layer.lora_magnitude_vector[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(5, 12)
    torch.testing.assert_close(linear(x), x @ weight.T + linear.bias)


@torch.no_grad()
def test_pissa_starts_from_the_largest_singular_values():
    linear, layer = _layer(init_lora_weights="pissa")
    u, s, vt = torch.linalg.svd(linear.weight, full_matrices=False)
    torch.testing.assert_close(1.5 * layer.lora_B @ layer.lora_A, u[:, :4] * s[:4] @ vt[:4])
    _, quick = _layer(init_lora_weights="pissa_niter_16")
    torch.testing.assert_close(quick.lora_B @ quick.lora_A, layer.lora_B @ layer.lora_A, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_olora_starts_from_orthonormal_columns_and_orthogonal_starts_cancel():
    linear, layer = _layer(init_lora_weights="olora")
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4))
    q, r = torch.linalg.qr(linear.weight)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, q[:, :4] @ r[:4])
    _, layer = _layer(init_lora_weights="orthogonal")
    assert layer.lora_A.abs().min() > 0
    assert layer.lora_B.abs().min() > 0
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, torch.zeros(8, 12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", [nn.Linear(7, 5), nn.Conv2d(3, 5, 3)], ids=["linear", "conv"])
def test_a_starts_with_the_numbers_that_torch_and_peft_draw_for_a_seed(module):
    torch.manual_seed(3)
    drawn = adapt(nn.Sequential(module), LoRA(r=2, target_modules=["0"])).tree.get_parameter("0.lora_A")
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty_like(drawn), a=5**0.5)  # as nn.Linear starts, and so peft's A
    assert torch.equal(drawn, expected)


def test_lora_fa_trains_b_alone_and_keeps_a_with_the_adapter():
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(12, 8)})
    adapter = adapt(model, LoRA(r=4, lora_fa=True))
    assert [p.shape for p in adapter.parameters()] == [(8, 4)]
    assert sorted(adapter.state_dict()) == ["linear.lora_A", "linear.lora_B"]


def test_patterns_give_modules_ranks_and_strengths_of_their_own():
    model = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(12, 8)})
    method = LoRA(r=4, lora_alpha=8, rank_pattern={"b": 2}, alpha_pattern={"a": 16})
    layers = adapt(model, method).tree.layers_by_module
    assert [len(layers[n].lora_A) for n in "ab"] == [4, 2]
    assert [layers[n].scale for n in "ab"] == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 9}, "a rank of 9 is above 8, the smaller side of the weight of 'linear'"),
        (
            {"rank_pattern": {"linaer": 2}},
            "rank_pattern: 'linaer' names none of the target modules; did you mean 'linear'",
        ),
        ({"rank_pattern": {"linear": 0}}, "rank_pattern: 'linear' must be a whole number of 1 or more"),
        ({"alpha_pattern": {"linear": 0}}, "alpha_pattern: 'linear' must be above 0"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be one of .* but got 'pisa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks"),
        ({"lora_fa": True, "init_lora_weights": "pissa"}, "True, 'gaussian' or 'eva'$"),
        ({"lora_bias": True, "bias": "all"}, "two biases for one"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=True has no meaning with use_dora=True"),
        (
            {"use_dora": True, "target_modules": ["embedding"]},
            "use_dora=True is for Linear and Conv1D, but 'embedding'",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_changes(options, message):
    model = nn.ModuleDict({"linear": nn.Linear(12, 8), "embedding": nn.Embedding(20, 12)})
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapt(model, LoRA(**{"r": 4, **options}))
    assert [type(m) for m in model.modules()] == classes


def test_a_bias_beside_b_cannot_be_merged_where_there_is_none():
    model = nn.ModuleDict({"linear": nn.Linear(12, 8, bias=False)})
    adapter = adapt(model, LoRA(r=4, lora_bias=True))
    with pytest.raises(ValueError, match="cannot be merged into a module without a bias"):
        adapter.merge()


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)], ids=["fused", "beside"])
def test_functional_transforms_take_plain_operators(perturb, make):
    model = nn.Sequential(make())
    perturb(adapt(model, LoRA(r=2)))
    x = torch.randn(5, 6)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda one: model(one).sum(), row) for row in x])
    found = torch.func.vmap(torch.func.grad(lambda one: model(one).sum()))(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)], ids=["fused", "beside"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_into_one_graph_under_autocast_too(perturb, make, autocast):
    model = nn.Sequential(make())
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    found = []
    for runs in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = torch.ones(3, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = runs(x)
        y.float().square().sum().backward()
        found.append([y.float(), x.grad, *(p.grad for p in adapter.parameters())])
        model.zero_grad()
    # 8 bits of each sum are kept under autocast
    exact = {"rtol": 2**-6, "atol": 2**-6} if autocast else {}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **exact)


class Packed(nn.Linear):
    """Two numbers a byte, as 4-bit quantizers keep them."""

    def __init__(self):
        super().__init__(12, 8)
        self.weight = nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            LoRA(r=2, use_dora=True),
            "use_dora=True reads the weight of '0', which is offloaded, quantized or not read yet",
        ),
        (LoRA(r=2, init_lora_weights="pissa"), "init_lora_weights='pissa' reads the weight of '0'"),
        (MiSS(r=4, init_weights="bat"), "init_weights='bat' changes the weight by what it is"),
    ],
)
@pytest.mark.parametrize("make", [Packed, lambda: nn.Linear(12, 8, device="meta")], ids=["quantized", "offloaded"])
def test_what_reads_the_weight_is_refused_where_it_is_not_there_as_its_numbers(method, message, make):
    model = nn.Sequential(make())
    with pytest.raises(ValueError, match=message):
        adapt(model, method)
    assert len(adapt(model, LoRA(r=2)).state_dict()) == 2


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("olora", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "namely quantized; merge it in peft"),
    ],
)
def test_a_file_of_peft_beside_a_base_that_peft_changed_is_refused(start, said):
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{start}' is relative to a base that peft changed.*{said}"
    ):
        LoRA.from_peft_config({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": start})


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_file_of_peft_that_started_beside_its_base_as_it_is_loads(start):
    assert LoRA.from_peft_config({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": start}).r == 2
