"""Low-rank changes of which each run of rows has its own, held to the formula."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.ops.lora_rows import Factors, add_by_row


def _runs():
    generator = torch.Generator().manual_seed(0)

    def change(r, scale):
        a = torch.randn(r, 5, dtype=torch.float64, generator=generator, requires_grad=True)
        b = torch.randn(7, r, dtype=torch.float64, generator=generator, requires_grad=True)
        return Factors(a, b, scale)

    first = change(2, 0.5)
    return [(2, first), (1, None), (1, change(4, 3.0)), (2, first)]


def _by_formula(y, x, runs):
    changes = [change for count, change in runs for _ in range(count)]
    return torch.stack(
        [y_i if f is None else y_i + f.scale * x_i @ f.a.T @ f.b.T for y_i, x_i, f in zip(y, x, changes, strict=True)]
    )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=["rows", "tokens", "heads", "no tokens"])
def test_outputs_and_gradients_are_those_of_each_row_alone(lead):
    runs = _runs()
    x = torch.randn(6, *lead, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, *lead, 7, dtype=torch.float64, requires_grad=True)
    tensors = [x, y, *runs[0][1][:2], *runs[2][1][:2]]
    got, expected = add_by_row(y, x, runs, in_place=True), _by_formula(y, x, runs)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((got * weights).sum(), tensors)
    for ours, theirs in zip(got, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_only_what_may_be_written_to_is(layout):
    runs = _runs()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    y = torch.randn(6, 3, 7, dtype=torch.float64)
    y = y if layout == "contiguous" else y.mT.contiguous().mT
    before, expected = y.clone(), _by_formula(y, x, runs)
    torch.testing.assert_close(add_by_row(y, x, runs), expected)
    assert torch.equal(y, before)
    got = add_by_row(y, x, runs, in_place=True)
    torch.testing.assert_close(got, expected)
    assert (got is y) == (layout == "contiguous")
