"""What singular values say of a change, beside plain float64 decompositions of the full matrix."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_peft import LoRA, adapt
from lightning_peft.analysis.spectrum import (
    effective_rank,
    kept_energy,
    matrix_singular_values,
    product_singular_values,
    rank_for,
)
from tests.method_table import CASES, IDS, shown_data

# one rounding of float64 in each of the two decompositions that are compared
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize(("n_out", "r", "n_in"), [(40, 3, 30), (5, 8, 30), (40, 8, 5), (6, 6, 6), (1, 2, 1)])
def test_the_factors_have_the_singular_values_of_their_product(n_out, r, n_in):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(r, n_in, generator=generator, dtype=torch.float64)
    b = torch.randn(n_out, r, generator=generator, dtype=torch.float64)
    whole = torch.linalg.svdvals(b @ a)
    found = product_singular_values(a, b)
    torch.testing.assert_close(found, whole[: len(found)], **CLOSE)
    assert whole[len(found) :].norm() < 1e-12 * whole.norm()
    torch.testing.assert_close(matrix_singular_values(b @ a), whole, **CLOSE)


def test_stacks_of_factors_are_decomposed_one_by_one():
    a, b = torch.randn(4, 2, 9).double(), torch.randn(4, 7, 2).double()
    expected = torch.stack([torch.linalg.svdvals(y @ x)[:2] for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(product_singular_values(a, b), expected, **CLOSE)


def test_the_effective_rank_is_that_of_roy_and_vetterli():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    values = torch.tensor([5.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    shares = [v / 8.5 for v in values.tolist()]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-12)


def test_the_rank_that_would_do_is_the_first_to_keep_the_share_of_the_squared_norm():
    values = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [rank_for(values, e) for e in (0.1, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert [kept_energy(values, r) for r in (1, 2, 3, 9)] == pytest.approx([9 / 14, 13 / 14, 1, 1])
    assert rank_for(torch.tensor([1.0, 1.0, 0.0]), 1.0) == 2
    assert rank_for(torch.zeros(3)) == 0
    assert kept_energy(torch.zeros(3), 1) == 1


@pytest.mark.parametrize(("row", "name"), CASES, ids=IDS)
def test_what_a_layer_says_of_its_factors_is_what_merging_would_add(build, perturb, row, name):
    model = build(name)
    adapter = shown_data(adapt(model, row.make()))
    perturb(adapter)
    for place, layer in adapter.tree.layers_by_module.items():
        products = layer.products()
        if products is None:
            continue
        deltas = layer.deltas(model.get_submodule(place))
        assert products.keys() == deltas.keys(), place
        for key, (a, b) in products.items():
            delta, product = deltas[key].detach(), (b @ a).detach()
            if delta.dim() > product.dim():
                delta = delta.flatten(1)
            same = min(
                (p for p in (product, product.mT) if p.shape == delta.shape), key=lambda p: float((p - delta).norm())
            )
            # float32 sums of at most 128 products
            torch.testing.assert_close(same, delta, rtol=1e-5, atol=1e-6)
    if isinstance(adapter.method, LoRA) and not (adapter.method.use_dora or adapter.method.lora_bias):
        places = [p for p in adapter.tree.record.layers if adapter.tree.layers_by_module[p].products() is not None]
        assert places, "the method of factors gives them"
