"""How two adapters differ, beside plain float64 decompositions of the full changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import LoRA, adapt
from lightning_peft.analysis.difference import Side, differences
from lightning_peft.analysis.subspace import directions, principal_angles, similarity

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def _orthonormal(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


def test_directions_are_the_singular_vectors_of_the_product():
    a, b = torch.randn(3, 20).double(), torch.randn(11, 3).double()
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    found = directions(a, b)
    torch.testing.assert_close(found.values, s[:3], **CLOSE)
    for mine, theirs in ((found.columns, u[:, :3]), (found.rows, vt[:3].T)):
        signs = (mine * theirs).sum(0).sign()
        torch.testing.assert_close(mine * signs, theirs, rtol=1e-8, atol=1e-8)


def test_similarity_is_that_of_the_paper():
    first, second = _orthonormal(12, 4, 0), _orthonormal(12, 3, 1)
    found = similarity(first, second)
    for i in range(1, 5):
        for j in range(1, 4):
            expected = (first[:, :i].T @ second[:, :j]).norm() ** 2 / min(i, j)
            torch.testing.assert_close(found[i - 1, j - 1], expected, **CLOSE)
    assert float(similarity(first, first)[3, 3]) == pytest.approx(1)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, 1.5, torch.pi / 2])
def test_angles_are_exact_near_zero_and_near_a_right_angle(angle):
    axes = torch.eye(5, dtype=torch.float64)
    c, s = torch.tensor([angle], dtype=torch.float64).cos(), torch.tensor([angle], dtype=torch.float64).sin()
    turned = torch.stack([axes[0], c * axes[1] + s * axes[2]], 1)
    for first, second in ((axes[:, :2], turned), (turned, axes[:, :2])):
        torch.testing.assert_close(principal_angles(first, second).tolist(), [0.0, angle], rtol=1e-12, atol=1e-15)
    assert len(principal_angles(axes[:, :1], turned)) == len(principal_angles(turned, axes[:, :1])) == 1


def test_angles_agree_with_scipys():
    from scipy.linalg import subspace_angles

    first, second = _orthonormal(15, 5, 2), _orthonormal(15, 3, 3)
    expected = sorted(subspace_angles(first.numpy(), second.numpy()).tolist())
    assert principal_angles(first, second).tolist() == pytest.approx(expected, abs=1e-9)


def _side(method, seed, sizes=(9, 7)):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 5))
    adapter = adapt(model, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Side(adapter.method, {"name": None, "fingerprint": "f"}, adapter.state_dict()), adapter


def test_changes_are_compared_as_the_full_matrices_would_be():
    (a, first), (b, second) = _side(LoRA(r=2, lora_alpha=6), 0), _side(LoRA(r=3, use_rslora=True), 1)
    found = differences(a, b)
    assert found.options == {"r": (2, 3), "lora_alpha": (6, 16), "use_rslora": (False, True)}
    assert (found.base, found.only, found.shapes, found.tensors, found.note) == ({}, ([], []), {}, [], None)
    assert [d.name for d in found.changes] == ["0", "1"]
    for d in found.changes:
        one, other = (
            x.tree.layers_by_module[d.name].deltas(x.model.get_submodule(d.name))["weight"].detach().double()
            for x in (first, second)
        )
        assert d.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-5)
        assert d.difference == pytest.approx(float((one - other).norm()), rel=1e-5)
        assert d.relative == pytest.approx(float((one - other).norm() / torch.cat([one, other]).norm()), rel=1e-5)
        (u, _, vt), (w, _, xt) = (torch.linalg.svd(x, full_matrices=False) for x in (one, other))
        i, j = d.ranks
        for spaces, p, q in ((d.columns, u[:, :i], w[:, :j]), (d.rows, vt[:i].T, xt[:j].T)):
            assert spaces.similarity == pytest.approx(float((p.T @ q).norm() ** 2 / min(i, j)), rel=1e-4)
            cosines = torch.linalg.svdvals(p.T @ q).clamp_max(1)
            assert spaces.angles == pytest.approx(torch.rad2deg(cosines.acos()).tolist(), abs=1e-2)


def test_an_adapter_does_not_differ_from_itself():
    side, _ = _side(LoRA(r=3), 0)
    found = differences(side, side)
    assert (found.options, found.base, found.only, found.shapes) == ({}, {}, ([], []), {})
    for d in found.changes:
        assert d.relative < 1e-14
        assert d.columns.similarity == pytest.approx(1)
        assert max(d.rows.angles) < 1e-5


def test_other_sizes_are_told_and_fail_nothing():
    (a, _), (b, _) = _side(LoRA(r=2), 0), _side(LoRA(r=2), 1, sizes=(8, 7))
    found = differences(a, b)
    assert found.shapes == {"0": ([7, 9], [7, 8])}
    assert [d.name for d in found.changes] == ["1"], "what has other sizes has no difference"


def test_a_change_that_is_zero_has_no_directions():
    side, _ = _side(LoRA(r=2), 0)
    still = Side(side.method, side.base, {n: t * ("lora_A" in n) for n, t in side.tensors.items()})
    found = differences(side, still)
    assert all(d.columns is None and d.relative == pytest.approx(1) for d in found.changes)
    assert all(d.relative == 0 for d in differences(still, still).changes)


def test_other_methods_are_compared_tensor_by_tensor():
    (a, _), (b, _) = _side(LoRA(r=2), 0), _side(lp.LoHa(r=2), 1)
    found = differences(a, b)
    assert found.options["method"] == ("LoRA", "LoHa")
    assert found.only[0] == ["0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"]
    assert "LoHa is no LoRA" in found.note
    (c, _) = _side(lp.LoHa(r=2), 2)
    found = differences(b, c)
    for d in found.tensors:
        expected = float((b.tensors[d.name].double() - c.tensors[d.name].double()).norm())
        assert d.difference == pytest.approx(expected)
    assert {d.name for d in found.tensors} == set(b.tensors)


def test_the_lengths_of_a_dora_are_compared_beside_its_product():
    (a, _), (b, _) = _side(LoRA(r=2, use_dora=True), 0), _side(LoRA(r=2, use_dora=True), 1)
    found = differences(a, b)
    assert [d.name for d in found.tensors] == ["0.lora_magnitude_vector", "1.lora_magnitude_vector"]
    assert "B A alone; the lengths of the rows" in found.note
