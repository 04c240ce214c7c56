"""OFT and BOFT: rotations that are rotations, and butterflies as the paper draws them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import BOFT, OFT, adapt
from lightning_peft.methods.oft import cayley


def _adapted(method, n_in=16, n_out=6):
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(n_in, n_out)}).double()
    adapter = adapt(model, method)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double() + torch.randn_like(parameter.double()) * 0.3
    return model["linear"], adapter


def test_the_exact_transform_is_orthogonal_and_the_series_nears_its_inverse():
    skew = torch.randn(3, 5, 5, dtype=torch.float64) * 0.05
    skew = skew - skew.mT
    exact = cayley(skew)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    torch.testing.assert_close(cayley(skew, 40), exact.mT)
    errors = [(cayley(skew, terms) - exact.mT).abs().max() for terms in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


@torch.no_grad()
def test_oft_keeps_the_angles_between_neurons():
    linear, adapter = _adapted(OFT(r=2, oft_block_size=0, use_cayley_neumann=False))
    delta = adapter.tree.layers_by_module["linear"].deltas(linear)["weight"]
    changed = linear.weight + delta
    assert delta.abs().max() > 0.1
    torch.testing.assert_close(changed @ changed.T, linear.weight @ linear.weight.T)


@torch.no_grad()
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterfly_factors_multiply_as_in_the_paper(factors):
    """The matrix is built here densely: factor i works on pairs of half-blocks that stand 2^i half-blocks apart."""
    n, size = 16, 4
    linear, adapter = _adapted(BOFT(boft_block_size=size, boft_n_butterfly_factor=factors), n)
    layer = adapter.tree.layers_by_module["linear"]
    skew = (layer.boft_R - layer.boft_R.mT) / 2
    eye = torch.eye(size, dtype=torch.float64)
    blocks = (eye - skew) @ torch.linalg.inv(eye + skew)
    whole = torch.eye(n, dtype=torch.float64)
    half = size // 2
    for i in range(factors):
        order = []
        for start in range(0, n, size * 2**i):
            halves = [range(h, h + half) for h in range(start, start + size * 2**i, half)]
            order += [k for part in (halves[0::2], halves[1::2]) for h in part for k in h]
        permute = torch.eye(n, dtype=torch.float64)[order]
        whole = permute @ torch.block_diag(*blocks[i]) @ permute.T @ whole
    x = torch.randn(3, n, dtype=torch.float64)
    expected = (x @ whole) @ linear.weight.T * layer.boft_s.flatten() + linear.bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            lambda: OFT(oft_block_size=5),
            "oft_block_size=5 must divide the 16 inputs of 'linear'; the nearest that do are 2 and 4",
        ),
        (lambda: BOFT(boft_block_size=5), "boft_block_size=5 must divide the 16 inputs"),
        (lambda: BOFT(boft_n_butterfly_factor=4), "whose number 8 divides, but 'linear' has 4 blocks of 4"),
        (lambda: OFT(r=2), "one of r and oft_block_size"),
        (lambda: BOFT(boft_block_num=2), "one of boft_block_size and boft_block_num"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        adapt(nn.ModuleDict({"linear": nn.Linear(16, 6)}), method())


@torch.no_grad()
@pytest.mark.parametrize("method", [OFT(r=2, oft_block_size=0), BOFT(boft_block_size=4)])
def test_autocast_leaves_rotations_what_they_are(method):
    torch.manual_seed(0)
    linear = nn.Linear(16, 6)
    seen = []
    linear.forward = lambda x: seen.append(x) or x[:, :6]
    adapter = adapt(nn.ModuleDict({"linear": linear}), method)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x)
    linear(x)
    assert torch.equal(*seen)
    assert not torch.allclose(seen[0], x)
