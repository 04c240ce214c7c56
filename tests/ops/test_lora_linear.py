"""The fused low-rank linear is held to plain PyTorch."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_peft.ops.lora_linear import lora_beside, lora_linear, lora_linear_reference


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


def _beside(x, w, b, a, up, scale, p=0.0):
    return lora_beside(torch.nn.functional.linear(x, w, b), x, a, up, scale, p)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_beside_a_layers_output_values_and_gradients_are_those_of_the_reference(p):
    results = []
    for function in (_beside, lora_linear_reference):
        x, w, b, a, up = _tensors()
        w.requires_grad_()  # whatever gave the output may train
        torch.manual_seed(3)
        y = function(x, w, b, a, up, 1.7, p)
        y.pow(2).sum().backward()
        results.append([y, x.grad, w.grad, b.grad, a.grad, up.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_beside_a_layers_output_gradients_are_those_of_finite_differences():
    x, w, b, a, up = _tensors()
    y = torch.nn.functional.linear(x, w, b).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: lora_beside(*t, 0.3), (y, x, a, up))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_beside_a_layers_output_the_input_and_the_factors_are_kept_and_no_mask(p):
    saved = []
    x, w, b, a, up = _tensors()
    y = torch.nn.functional.linear(x, w, b).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_beside(y, x, a, up, 0.3, p)
    assert [tuple(t.shape) for t in saved] == [(2, 3, 5), (2, 5), (4, 2), (2, 6)]


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_beside_a_layers_output_autocast_computes_in_16_bits_and_gives_the_layers_dtype(own):
    x, _, _, a, up = _tensors(torch.float32)
    y = torch.zeros(2, 3, 4, dtype=own)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora_beside(y, x, a, up, 1.0)
    assert found.dtype == own
    expected = (x.bfloat16().float() @ a.bfloat16().float().T).bfloat16().float() @ up.bfloat16().float().T
    # 8 bits of the product are kept
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-6)
    y = torch.randn(2, 3, 4).to(own)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_beside(y, x, a, torch.zeros_like(up), 1.0), y)


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


def _kept(run):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        outputs = run()
    return list(saved.values()), outputs


def test_layers_with_the_same_input_keep_one_copy_of_it_under_autocast():
    x, w, b, a, up = _tensors(torch.float32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return [lora_linear(x, w, b, a, up, 1.0) for _ in range(3)]

    saved, outputs = _kept(run)
    assert sum(t.shape == x.shape for t in saved) == 1
    assert not [t for t in saved if t.shape == w.shape and t.data_ptr() != w.data_ptr()]  # nor a cast of the weight
    sum(outputs).float().sum().backward()
    thrice, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        lora_linear(x, w, b, a, up, 1.0).float().sum().backward()
    torch.testing.assert_close(thrice, 3 * x.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", ["values", "grad", "dtype"])
def test_an_input_that_has_changed_is_cast_anew(change):
    x, w, b, a, up = _tensors(torch.float32)
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        before = lora_linear(x, w, b, a, up, 1.0)
    if change == "values":
        x.mul_(2)
    elif change == "grad":
        x.requires_grad_()
    dtype = torch.float16 if change == "dtype" else torch.bfloat16
    with torch.autocast("cpu", dtype):
        after = lora_linear(x, w, b, a, up, 1.0)
        expected = lora_linear_reference(x, w, b, a, up, 1.0)
    torch.testing.assert_close(after, expected, rtol=2e-2, atol=2e-2)
    assert after.dtype == dtype
    after.float().sum().backward()
    assert (x.grad is not None) == (change == "grad")
    assert before.shape == after.shape


def test_no_input_is_kept_longer_than_its_layers_need_it():
    x, w, b, a, up = _tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, b, a, up, 1.0)
    held = y.grad_fn.saved_tensors[0] if hasattr(y.grad_fn, "saved_tensors") else None
    assert held is not None
    cast = weakref.ref(held)
    del y, held
    gc.collect()
    assert cast() is None


def _gated(function, left, right, *rest):
    gate, up = left.sigmoid(), right * 1
    return function(gate * up, *rest)


def test_an_input_that_is_a_product_of_what_is_kept_anyway_is_multiplied_again():
    left, w, b, a, up = _tensors()
    right = (left.detach() + 1).requires_grad_()
    for p in (0.0, 0.4):
        results = []
        for function in (lora_linear, lora_linear_reference):
            torch.manual_seed(3)
            y = _gated(function, left, right, w, b, a, up, 1.7, p)
            results.append([y, *torch.autograd.grad(y.pow(2).sum(), (left, right, a, up, b))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    node = _gated(lora_linear, left, right, w, b, a, up, 1.7).grad_fn
    product = node.next_functions[0][0]
    assert {t.data_ptr() for t in node.saved_tensors[:2]} == {
        product._saved_self.data_ptr(),
        product._saved_other.data_ptr(),
    }


def test_factors_that_change_before_the_backward_pass_are_noticed():
    left, w, b, a, up = _tensors()
    gate = left.sigmoid()
    y = lora_linear(gate * left.exp(), w, b, a, up, 1.0)
    with torch.no_grad():
        gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_frozen_a_keeps_no_input():
    x, w, b, a, up = _tensors()
    y = lora_linear(x, w, b, a.detach(), up, 1.0)
    assert not [t for t in y.grad_fn.saved_tensors if t is not None and t.numel() == x.numel()]
    y.sum().backward()
    assert up.grad is not None


def test_checkpointed_gated_layers_have_the_same_gradients():
    left, w, b, a, up = _tensors()
    right = (left.detach() + 1).requires_grad_()
    found = []
    for checkpointed in (True, False):
        run = functools.partial(_gated, lora_linear)
        arguments = (left, right, w, b, a, up, 1.7)
        y = checkpoint(run, *arguments, use_reentrant=False) if checkpointed else run(*arguments)
        found.append(torch.autograd.grad(y.pow(2).sum(), (left, right, a, up, b)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_output_can_be_added_to_in_place():
    x, w, b, a, up = _tensors()
    y = lora_linear(x, w, b, a, up, 1.0)
    expected = torch.autograd.grad((y + 1).pow(2).sum(), a, retain_graph=True)
    y.add_(1)
    assert torch.equal(torch.autograd.grad(y.pow(2).sum(), a)[0], expected[0])


def test_a_product_that_was_changed_in_place_is_kept_as_it_is():
    left, w, b, a, up = _tensors()
    right = (left.detach() + 1).requires_grad_()
    found = []
    for function in (lora_linear, lora_linear_reference):
        x = left.exp() * right.exp()
        with torch.no_grad():
            x.clamp_(max=1)
        found.append(torch.autograd.grad(function(x, w, b, a, up, 1.7).pow(2).sum(), (a, up)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_product_whose_graph_is_used_up_is_read_as_any_input():
    left, w, b, a, up = _tensors()
    x = left.exp() * left.sin()
    x.sum().backward()
    with torch.no_grad():
        assert torch.equal(lora_linear(x, w, b, a, up, 1.0), lora_linear(x.detach(), w, b, a, up, 1.0))
    assert lora_linear(x.detach() * 1, w, b, a, up, 1.0).requires_grad
