"""LoRAs of which each example has its own, run for the whole batch at once: the same numbers, and the path is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import IA3, Adapter, LoRA, activate, adapt, adapter_names
from lightning_peft.ops.lora_linear import calls

NAMES = ["a", "a", None, "b", "c", "a"]
# float32 products of the same numbers in batches of other sizes
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def net(*methods, perturb, layer=None):
    """Two linear layers with adapters a, b, c."""
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()
    for by, (name, method) in enumerate(zip("abc", methods, strict=True), start=1):
        torch.manual_seed(by)
        perturb(adapt(model, method, name), 0.2 * by)
    return model.eval()


def unlike(**options):
    """Three LoRAs of other ranks, strengths and modules."""
    return (
        LoRA(r=2, target_modules=["0", "2"], **options),
        LoRA(r=3, lora_alpha=5, use_rslora=True, target_modules=["0", "2"], **options),
        LoRA(r=1, target_modules=["2"], **options),
    )


def alone(model, x, names, rows=1):
    outputs = []
    for i, name in enumerate(names):
        activate(model, *([] if name is None else [name]))
        outputs.append(model(x[i * rows : (i + 1) * rows]))
    return torch.cat(outputs)


def ran(model, x, names, repeats=1):
    """What a mixed batch gives, and how many layers ran on which path."""
    before = dict(calls)
    with adapter_names(model, names, repeats):
        y = model(x)
    return y, {k: calls[k] - before[k] for k in calls if calls[k] > before[k]}


BY_ROW = {"by_row": 2}


@torch.no_grad()
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["rows", "tokens", "heads"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_unlike_adapters_and_the_base_run_at_once(perturb, lead, repeats):
    model = net(*unlike(), perturb=perturb)
    x = torch.randn(len(NAMES) * repeats, *lead, 6)
    expected = alone(model, x, NAMES, repeats)
    y, paths = ran(model, x, NAMES, repeats)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert paths == BY_ROW
    with torch.inference_mode():
        torch.testing.assert_close(ran(model, x, NAMES, repeats)[0], expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"lora_fa": True}], ids=["lora", "lora_fa"])
def test_each_adapter_gets_the_gradients_of_its_own_examples(perturb, options):
    model = net(*unlike(**options), perturb=perturb).train()
    x = torch.randn(len(NAMES), 3, 6, requires_grad=True)

    def gradients(y):
        wanted = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
        return dict(zip(wanted, torch.autograd.grad(y.pow(2).sum(), wanted.values()), strict=True))

    expected = gradients(alone(model, x, NAMES))
    y, paths = ran(model, x, NAMES)
    assert paths == BY_ROW
    for name, gradient in gradients(y).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_a_base_in_sixteen_bits_runs_at_once(perturb, precision):
    model = net(*unlike(), perturb=perturb)
    if precision != "autocast":
        model = model.to(getattr(torch, precision))
    assert model.adapters["a"].get_parameter("0.lora_A").dtype == torch.float32
    x = torch.randn(len(NAMES), 3, 6, dtype=model[0].weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = alone(model, x, NAMES)
        y, paths = ran(model, x, NAMES)
    assert paths == BY_ROW
    assert y.dtype == expected.dtype != torch.float32
    # a few roundings of eight bits, each of numbers of about one
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "option",
    [{"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}],
    ids=["lora_bias", "use_dora", "orthogonal"],
)
def test_what_is_more_than_a_product_runs_one_adapter_after_the_other(perturb, option):
    first, second, third = unlike()
    second = LoRA(r=2, target_modules=["0", "2"], **option)
    model = net(first, second, third, perturb=perturb)
    x = torch.randn(len(NAMES), 6)
    expected = alone(model, x, NAMES)
    y, paths = ran(model, x, NAMES)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert "by_row" not in paths


@torch.no_grad()
def test_another_method_at_the_same_module_runs_by_itself(perturb):
    first, _, third = unlike()
    model = net(first, IA3(target_modules=["0"], feedforward_modules=[]), third, perturb=perturb)
    x = torch.randn(len(NAMES), 6)
    expected = alone(model, x, NAMES)
    y, paths = ran(model, x, NAMES)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert paths == {"beside": 1, "by_row": 1}


@torch.no_grad()
def test_dropout_is_drawn_in_training_and_not_in_evaluation(perturb):
    model = net(*unlike(lora_dropout=0.5), perturb=perturb)
    x = torch.randn(len(NAMES), 6)
    expected = alone(model, x, NAMES)
    y, paths = ran(model, x, NAMES)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert paths == BY_ROW
    y, paths = ran(model.train(), x, NAMES)
    assert "by_row" not in paths
    assert not torch.allclose(y, expected, **CLOSE)
    torch.testing.assert_close(y[2], expected[2], **CLOSE)


@torch.no_grad()
def test_a_hook_on_an_adapters_layer_sees_its_examples(perturb):
    model = net(*unlike(), perturb=perturb)
    seen = []
    hook = Adapter(model, "a").tree.layers_by_module["0"].register_forward_hook(lambda m, args, y: seen.append(len(y)))
    x = torch.randn(len(NAMES), 6)
    y, paths = ran(model, x, NAMES)
    assert seen == [3]
    assert paths["by_row"] == 1
    hook.remove()
    torch.testing.assert_close(y, ran(model, x, NAMES)[0], **CLOSE)


class Remembering(nn.Linear):
    """A linear layer that keeps what it gave."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = super().forward(x)
        return self.given


@torch.no_grad()
def test_what_a_module_keeps_of_its_output_stays_as_it_was(perturb):
    model = net(*unlike(), perturb=perturb, layer=Remembering(6, 8))
    x = torch.randn(len(NAMES), 6)
    expected = alone(model, x, NAMES)
    y, paths = ran(model, x, NAMES)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert paths == BY_ROW
    torch.testing.assert_close(model[0].given, nn.functional.linear(x, model[0].weight, model[0].bias), **CLOSE)


class Named(nn.Module):
    """Calls a layer by its input's name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(input=x)


@torch.no_grad()
def test_a_layer_that_is_called_by_its_inputs_name_takes_part(perturb):
    model = Named()
    for name, by in (("a", 0.1), ("b", -0.2)):
        perturb(adapt(model, LoRA(r=2), name), by)
    x = torch.randn(3, 6)
    expected = alone(model, x, ["a", "b", None])
    y, paths = ran(model, x, ["a", "b", None])
    torch.testing.assert_close(y, expected, **CLOSE)
    assert paths["by_row"] == 1
