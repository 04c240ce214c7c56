"""LoRA on stacked weights: an expert at a time, in both layouts, with PEFT's numbers and files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, adapt, load_adapter

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Three experts, all of which see every row; ``W: (3, in, out)`` or ``(3, out, in)``."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, *((6, 5) if is_transposed else (5, 6))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->ebo" if self.is_transposed else "bi,eoi->ebo", x, self.weight)


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, **experts, head_dim=8, num_key_value_heads=2, vocab_size=97, pad_token_id=0)
    return GptOssForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_expert_has_a_change_of_its_own(is_transposed, perturb):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(is_transposed))
    method = LoRA(r=2, lora_alpha=6, target_modules=[], target_parameters=["0.weight"])
    adapter = adapt(model, method)
    perturb(adapter, 0.5)
    a, b = (adapter.state_dict()[f"0.weight.{key}"] for key in ("lora_A", "lora_B"))
    assert (a.shape, b.shape) == ((6, 6), (5, 6))
    x = torch.randn(4, 6)
    for number, y in enumerate(model(x)):
        weight = model[0].weight[number]
        change = 3 * b[:, number::3] @ a[2 * number : 2 * number + 2]
        torch.testing.assert_close(y, x @ (weight if is_transposed else weight.T) + x @ change.T)


@torch.no_grad()
def test_a_transposed_stack_and_its_biases_are_those_of_peft(call, perturb, tmp_path):
    """GPT-OSS keeps its experts ``(E, in, out)``, and has four parameters in one module, so three wrappers in PEFT."""
    names = [*EXPERTS, "experts.gate_up_proj_bias"]
    ours = _gpt_oss()
    adapter = adapt(ours, LoRA(r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=names))
    perturb(adapter, 0.2)
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(_gpt_oss(), tmp_path / "a").double()
    ours.double()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()
    expected = call(theirs, "moe")
    torch.testing.assert_close(call(ours, "moe"), expected, rtol=1e-10, atol=1e-10)
    with adapter.disabled():
        assert not torch.allclose(call(ours, "moe"), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"target_parameters": ["experts.down_proj"]}])
def test_what_peft_makes_of_a_mixture_by_itself_loads_here(options, build, call, tmp_path):
    """Its ``all-linear`` also names Mixtral's experts and routers, with twice the rank where two weights lie fused."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(build("moe"), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = build("moe")
    base = call(model, "moe")
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(call(model, "moe"), call(theirs, "moe"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(call(model, "moe"), base, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_the_grouped_products_of_transformers_see_the_changed_weights(build, call, perturb):
    model = build("moe")
    perturb(adapt(model, LoRA(r=4, target_parameters=EXPERTS)))
    expected = call(model, "moe")
    for way in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        torch.testing.assert_close(call(model, "moe"), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_adapters_on_the_same_experts_add_up(perturb):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(False))
    x = torch.randn(4, 6)
    base, changes = model(x), []
    for name in ("first", "second"):
        adapter = adapt(model, LoRA(r=2, target_modules=[], target_parameters=["0.weight"]), name)
        perturb(adapter, 0.5 if name == "first" else 0.2)
        changes.append(model(x) - base)
    model.adapters.switch.active = ("first", "second")
    torch.testing.assert_close(model(x), base + changes[0] + changes[1])


def test_gradients_reach_the_factors_of_experts_under_autocast(build, call):
    model = build("moe")
    adapter = adapt(model, LoRA(r=4, target_modules=[], target_parameters=EXPERTS))
    with torch.autocast("cpu", torch.bfloat16):
        call(model, "moe").float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
    assert all(p.grad.abs().max() > 0 for n, p in adapter.tree.named_parameters() if n.endswith("lora_B"))


def test_the_plan_says_which_stacked_weights_are_not_reached(build):
    without = adapt(build("moe"), LoRA(r=2)).plan
    stacked = 2 * 4 * (128 * 32 + 32 * 64)
    assert f"{stacked:,} parameters are experts' stacked weights, which are not reached" in str(without)
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in str(without)
    assert "Reaches 8 of 8 linear layers" in str(without)
    assert "stacked" not in str(adapt(build("moe"), LoRA(r=2, target_parameters=EXPERTS)).plan)
    assert "stacked" not in str(adapt(build("llama"), LoRA(r=2)).plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.down_prj"]}, "'experts.down_prj' matches no parameter; did you mean"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list of strings or None"),
        ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight' belongs to .*q_proj', which target_modules names"),
        ({"target_parameters": ["norm.weight"]}, r"expected a matrix or a stack of matrices, but it is \(32,\)"),
        ({"target_parameters": EXPERTS, "r": 40, "target_modules": []}, "a rank of 40 is above 32, the smaller side"),
        ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, "lora_dropout=0.1 has no meaning for a bare parameter"),
        (
            {"target_parameters": EXPERTS, "init_lora_weights": "eva"},
            "init_lora_weights='eva' has no meaning for a bare parameter",
        ),
        ({"target_parameters": EXPERTS, "use_dora": True}, "use_dora=True has no meaning for a bare parameter"),
        ({"target_parameters": EXPERTS, "rank_pattern": {"up_proj": 2}}, "'up_proj' names none of the target modules"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(options, message, build):
    model = build("moe")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapt(model, LoRA(**{"r": 4, **options}))
    assert [type(m) for m in model.modules()] == classes


def test_a_parameter_of_the_root_itself_is_refused():
    with pytest.raises(ValueError, match="'weight' belongs to Experts itself"):
        adapt(Experts(False), LoRA(r=2, target_modules=[], target_parameters=["weight"]))
