"""The fused low-rank linear is held to plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.ops.lora_linear import lora_linear, lora_linear_reference


def _tensors(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)

    return make(2, 3, 5), make(4, 5).detach(), make(4) if bias else None, make(2, 5), make(4, 2)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_reference(bias, p):
    results = []
    for function in (lora_linear, lora_linear_reference):
        x, w, b, a, up = _tensors(bias=bias)
        torch.manual_seed(3)
        y = function(x, w, b, a, up, 1.7, p)
        torch.manual_seed(4)  # the mask is that of the forward pass, whatever is drawn in between
        y.pow(2).sum().backward()
        results.append([y, x.grad, a.grad, up.grad, b.grad if bias else y])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, w, b, a, up = _tensors()
    assert torch.autograd.gradcheck(lambda x, b, a, up: lora_linear(x, w, b, a, up, 0.3), (x, b, a, up))


def test_the_backward_pass_of_dropout_draws_nothing_from_the_generator():
    x, w, b, a, up = _tensors()
    y = lora_linear(x, w, b, a, up, 0.3, 0.5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_with_dropout_nothing_is_kept_for_the_backward_pass_that_is_not_kept_without():
    kept = []
    for p in (0.0, 0.5):
        saved = []
        x, w, b, a, up = _tensors()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            lora_linear(x, w, b, a, up, 0.3, p)
        kept.append([t.shape for t in saved])
    assert kept[0] == kept[1]


def test_sixteen_bit_inputs_keep_sixteen_bit_tensors_for_the_backward_pass():
    x, w, b, a, up = _tensors(torch.float32)
    saved = []
    x16 = x.detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x16, w.bfloat16(), b.detach().bfloat16(), a, up, 1.0)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in saved} == {torch.bfloat16}
    y.sum().backward()
    assert a.grad.dtype == torch.float32


def test_autocast_computes_in_its_dtype():
    x, w, b, a, up = _tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, b, a, up, 1.0)
        expected = lora_linear_reference(x, w, b, a, up, 1.0)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits of precision
    y.sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32
