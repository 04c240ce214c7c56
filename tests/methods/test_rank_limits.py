"""A rank above what a weight has room for is refused before training; one that another library wrote loads as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft import adapt, load_adapter


def _nets():
    # 32 inputs and 24 outputs; the embedding has 40 rows of 16
    return nn.ModuleDict({"linear": nn.Linear(32, 24), "rows": nn.Embedding(40, 16), "conv": nn.Conv2d(2, 6, 3)})


TOO_HIGH = {
    "lora": (
        lp.LoRA(r=25),
        r"a rank of 25 is above 24.*'linear'; lower r, .*\{'linear': 24\}\) or exclude it \(exclude",
    ),
    "lora_pattern": (lp.LoRA(rank_pattern={"linear": 30}), "a rank of 30 is above 24"),
    "lora_embedding": (lp.LoRA(r=17, target_modules=["rows"]), r"a rank of 17 is above 16.*'rows'.*\{'rows': 16\}"),
    "lora_convolution": (lp.LoRA(r=7, target_modules=["conv"]), "a rank of 7 is above 6.*'conv'"),
    "dora": (lp.LoRA(r=25, use_dora=True), "a rank of 25 is above 24"),
    "pissa": (lp.LoRA(r=25, init_lora_weights="pissa"), "a rank of 25 is above 24"),
    "eva": (lp.LoRA(r=25, init_lora_weights="eva"), "a rank of 25 is above 24"),
    "adalora": (lp.AdaLoRA(init_r=25), "AdaLoRA: init_r=25 is above 24.*'linear'; lower it to 24"),
    "adalora_end": (lp.AdaLoRA(target_r=30, init_r=30), "init_r=30 is above 24"),
    "loha": (lp.LoHa(r=25), "LoHa: r=25 is above 24.*'linear'; lower it to 24"),
    "loha_convolution": (lp.LoHa(r=7, target_modules=["conv"]), "LoHa: r=7 is above 6.*'conv'"),
    "randlora": (lp.RandLoRA(r=25), "RandLoRA: r=25 is above 24.*'linear'; lower it to 24"),
    "miss": (lp.MiSS(r=33), "MiSS at 'linear', .*: r=33 is above 32, the number of inputs; lower it to 32"),
    "miss_bat": (lp.MiSS(r=33, init_weights="bat"), "r=33 must divide both .*; the nearest that do are 4 and 8"),
    "miss_mini": (lp.MiSS(r=8, init_weights="mini", mini_r=25), "mini_r=25 must divide .* are 12 and 24"),
    "oft_block": (lp.OFT(oft_block_size=64), "oft_block_size=64 must divide the 32 inputs of 'linear'.* 16 and 32"),
    "oft_number": (lp.OFT(r=64, oft_block_size=0), "r=64 must divide the 32 inputs of 'linear'.* are 16 and 32"),
    "boft_block": (lp.BOFT(boft_block_size=64), "boft_block_size=64 must divide the 32 inputs .* are 16 and 32"),
    "boft_number": (
        lp.BOFT(boft_block_size=0, boft_block_num=64),
        "boft_block_num=64 must divide the 32 inputs .* are 16 and 32",
    ),
    "sparse": (lp.SparseTuning(r=25), "r=25 asks for 1400 entries of 'linear', which has 768; r can be 13 at most"),
}


@pytest.mark.parametrize(("method", "said"), TOO_HIGH.values(), ids=TOO_HIGH)
def test_a_rank_above_the_weights_sides_names_what_was_given_and_what_fits(method, said):
    model = _nets()
    names = set(dict(model.named_modules()))
    with pytest.raises(ValueError, match=said):
        adapt(model, method)
    assert set(dict(model.named_modules())) == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            lp.LoRA(r=33, target_modules=[], target_parameters=["experts.down_proj"]),
            "33 is above 32.*experts.down_proj'.* or leave it out of target_parameters",
        ),
        (lp.LoReFT(r=33), "r=33 is above the hidden size 32 of 'model.layers.0'; lower it to 32"),
        (
            lp.Compacter(reduction_factor=4, phm_rank=3),
            r"phm_rank=3 is above 2, .*\(a bottleneck of 8 in phm_dim=4 parts\); lower it to 2 or less",
        ),
    ],
    ids=["lora_experts", "loreft", "compacter"],
)
def test_the_same_holds_for_what_a_model_bounds(method, said, build):
    with pytest.raises(ValueError, match=said):
        adapt(build("moe"), method)


@pytest.mark.parametrize(
    "method",
    [
        lp.LoRA(r=24),
        lp.LoRA(r=16, target_modules=["rows"]),
        lp.AdaLoRA(init_r=24),
        lp.LoHa(r=24),
        lp.RandLoRA(r=24),
        lp.MiSS(r=32),
        lp.OFT(oft_block_size=32),
        lp.BOFT(boft_block_size=32),
        lp.SparseTuning(r=13),
        # these have a meaning beyond: a rank costs VeRA one number, and LoKr takes the factor whole
        lp.VeRA(r=100),
        lp.LoKr(r=100),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_largest_that_fits_is_taken(method, perturb):
    model = _nets()
    adapter = adapt(model, method)
    perturb(adapter)
    assert torch.isfinite(model["linear"](torch.ones(2, 32))).all()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # what peft warns of
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LORA", {"r": 20, "lora_alpha": 6, "init_lora_weights": False}),
        ("LOHA", {"r": 20, "init_weights": False}),
        ("ADALORA", {"init_r": 20, "target_r": 20, "total_step": 5}),
        ("RANDLORA", {"r": 20, "init_weights": False}),
        # where a block does not divide the inputs, peft takes the nearest that does
        ("OFT", {"oft_block_size": 24, "init_weights": False}),
        ("OFT", {"oft_block_size": 48, "init_weights": False}),
        ("OFT", {"r": 3, "oft_block_size": 0, "init_weights": False}),
    ],
)
def test_an_adapter_that_peft_made_beyond_the_limit_loads_as_it_is(kind, options, build, call, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["k_proj"], **options)
    theirs = peft.get_peft_model(build("llama"), config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build("llama")
    adapter = load_adapter(ours, tmp_path / "theirs")
    expected = call(theirs, "llama")
    torch.testing.assert_close(call(ours, "llama"), expected, rtol=1e-6, atol=1e-6)
    adapter.save(tmp_path / "ours")
    load_adapter(again := build("llama"), tmp_path / "ours")
    torch.testing.assert_close(call(again, "llama"), call(ours, "llama"), rtol=0, atol=0)
    back = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(call(back, "llama"), expected, rtol=1e-6, atol=1e-6)


def test_a_small_head_that_nothing_says_is_one_has_the_ways_out_that_the_refusal_names():
    def net():
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))

    said = r"'1'; lower r, .* \(rank_pattern=\{'1': 2\}\) or exclude it \(exclude_modules=\['1'\]\)"
    with pytest.raises(ValueError, match=said):
        adapt(net(), lp.LoRA(r=4))
    assert len(adapt(net(), lp.LoRA(r=4, rank_pattern={"1": 2})).tree.layers_by_module) == 2
    assert len(adapt(net(), lp.LoRA(r=4, exclude_modules=["1"])).tree.layers_by_module) == 1
