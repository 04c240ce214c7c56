"""The sparse linear map against the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.ops.sparse_linear import dense, sparse_linear, sparse_linear_reference

SHAPE = (4, 5)


def _tensors(dtype=torch.float64, lead=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(20, generator=generator)[:7]
    indices = torch.stack([flat // 5, flat % 5]).int()
    x = torch.randn(*lead, 5, generator=generator, dtype=dtype, requires_grad=True)
    values = torch.randn(7, generator=generator, dtype=dtype, requires_grad=True)
    return x, values, indices


def test_each_value_stands_in_its_own_place():
    _, values, indices = _tensors()
    whole = torch.zeros(SHAPE, dtype=torch.float64)
    for value, row, column in zip(values.tolist(), *indices.tolist(), strict=True):
        whole[row, column] = value
    assert torch.equal(dense(values, indices, SHAPE), whole)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_outputs_and_gradients_are_those_of_the_reference(lead):
    found, expected = [], []
    for function, into in ((sparse_linear, found), (sparse_linear_reference, expected)):
        x, values, indices = _tensors(lead=lead)
        y = function(x, values, indices, SHAPE)
        into += [y, *torch.autograd.grad(y.pow(2).sum(), (x, values))]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_the_gradients_are_the_numerical_ones():
    x, values, indices = _tensors()
    assert torch.autograd.gradcheck(lambda a, b: sparse_linear(a, b, indices, SHAPE), (x, values))


def test_it_computes_in_the_inputs_dtype_under_autocast_too():
    x, values, indices = _tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(x.bfloat16(), values, indices, SHAPE)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert values.grad.dtype == torch.float32


def test_the_matrix_is_not_kept_for_the_backward_pass():
    x, values, indices = _tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sparse_linear(x, values, indices, SHAPE)
    assert SHAPE not in [tuple(s) for s in kept]
    assert len(kept) == 3
