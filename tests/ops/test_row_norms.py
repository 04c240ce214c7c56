"""The rows' lengths of a changed weight are those of the matrix that is not built."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.ops.row_norms import row_norms


def _tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((1500, 64), (4, 64), (1500, 4)))
    w[3] = b[4] = 0
    return w.to(dtype), a, b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norms_are_those_of_the_whole_matrix(dtype):
    w, a, b = _tensors(dtype)
    expected = (w.double() + 0.7 * (b.double() @ a.double())).norm(dim=1).float()
    torch.testing.assert_close(row_norms(w, a, b, 0.7), expected, rtol=1e-6, atol=1e-6)  # some units in the last place


def test_without_a_change_the_norm_is_that_of_the_weight_to_the_last_bit():
    w, a, b = _tensors()
    norms = torch.linalg.vector_norm(w, dim=1)
    norms[3] = torch.finfo(torch.float32).tiny  # a row of zeros, by whose length one divides
    assert torch.equal(row_norms(w, a, torch.zeros_like(b), 0.7), norms)
