"""The same numbers and the same files as Hugging Face PEFT."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lightning_peft import (
    BOFT,
    IA3,
    OFT,
    AdaLoRA,
    LlamaAdapter,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PromptTuning,
    RandLoRA,
    SparseTuning,
    TrainableTokens,
    VeRA,
    adapt,
    load_adapter,
)
from lightning_peft.formats.hf_peft import method_from_peft

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
_NEEDED = {AdaLoRA: {"total_step": 10}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

METHODS = {
    "lora": (LoRA(r=4, lora_alpha=6), ("bert", "gpt2", "llama", "t5", "llama_classifier", "roberta")),
    "rslora": (LoRA(r=4, lora_alpha=6, use_rslora=True), ("bert",)),
    "bias_lora_only": (LoRA(r=4, lora_alpha=6, bias="lora_only"), ("bert",)),
    "bias_all": (LoRA(r=4, lora_alpha=6, bias="all"), ("bert", "gpt2")),
    "embedding": (LoRA(r=4, lora_alpha=6, target_modules=r".*(word_embeddings|embed_tokens)"), ("bert", "llama")),
    "head": (LoRA(r=4, lora_alpha=6, modules_to_save=["classifier"]), ("bert", "roberta")),
    "score": (LoRA(r=4, lora_alpha=6, modules_to_save=["score"]), ("llama_classifier",)),
    "prompt": (PromptTuning(5), ("llama", "gpt2", "t5")),
    "prompt_head": (PromptTuning(5, modules_to_save=["classifier"]), ("bert",)),
}
CASES = [pytest.param(m, n, id=f"{k}-{n}") for k, (m, names) in METHODS.items() for n in names]


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), CASES)
def test_peft_loads_our_adapter_and_gives_the_same_output(method, name, build, call, perturb, tmp_path):
    model = build(name)
    adapter = adapt(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").eval()
    torch.testing.assert_close(call(theirs, name)[:, -7:], call(model, name), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), CASES)
def test_an_adapter_made_by_peft_loads_here(method, name, build, call, tmp_path):
    types = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama_classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
    common = {"task_type": types.get(name, "CAUSAL_LM"), "modules_to_save": method.modules_to_save}
    if isinstance(method, PromptTuning):
        options = {"num_virtual_tokens": 5, "num_transformer_submodules": 1}
        config = peft.PromptTuningConfig(**options, **common)
    else:
        fields = ("r", "lora_alpha", "use_rslora", "bias", "target_modules")
        config = peft.LoraConfig(**{f: getattr(method, f) for f in fields}, **common)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(build(name), config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.save_pretrained(tmp_path / "a")
    model = build(name)
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(call(model, name), call(theirs, name)[:, -7:], **CLOSE)


@torch.no_grad()
def test_peft_loads_lora_on_torchs_attention(build, call, perturb, tmp_path):
    method = LoRA(r=4, lora_alpha=6, target_modules=["self_attn"])
    model = build("encoder")
    adapter = adapt(model, method)
    perturb(adapter)
    for key, tensor in adapter.state_dict().items():
        if "out_proj" in key:  # peft 0.21 adds this part's change twice; ours is held to the formula elsewhere
            tensor.zero_()
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build("encoder"), tmp_path / "a").train()
    torch.testing.assert_close(call(theirs, "encoder"), call(model.train(), "encoder"), rtol=1e-4, atol=1e-5)


def test_ten_steps_of_training_are_those_of_peft(build, call):
    """From the same start, with the same optimizer: the same losses and the same parameters."""
    ours = build("llama").double()
    adapter = adapt(ours, LoRA(r=4, lora_alpha=6))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.data = parameter.data.double()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    theirs = peft.get_peft_model(build("llama").double(), config)
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs = {}
    with torch.no_grad():
        for key, parameter in zip(adapter.state_dict(), adapter.parameters(), strict=True):
            pairs[key] = named[f"base_model.model.{key}.default.weight"]
            pairs[key].copy_(parameter)
    losses = []
    for model, parameters in ((ours, adapter.parameters()), (theirs, list(pairs.values()))):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        seen = []
        for _ in range(10):
            loss = call(model, "llama").pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    for key, parameter in zip(pairs, adapter.parameters(), strict=True):
        torch.testing.assert_close(parameter, pairs[key].data, rtol=1e-8, atol=1e-8, check_dtype=False)


def test_the_row_of_the_padding_trains_no_more_than_in_peft(build):
    """Rows with padding, which all texts but the longest of a batch have."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
    ours = build("llama")
    adapter = adapt(ours, LoRA(r=4, target_modules=["embed_tokens"]))
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, lora_alpha=16, target_modules=["embed_tokens"]))
    layer = theirs.base_model.model.model.embed_tokens
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    state = adapter.tree.state_dict(keep_vars=True)
    mine = state["model.embed_tokens.lora_embedding_A"]
    with torch.no_grad():
        b.copy_(state["model.embed_tokens.lora_embedding_B"])
    for model in (ours, theirs):
        model(input_ids=ids).logits.pow(2).mean().backward()
    assert not mine.grad[:, 0].any()
    torch.testing.assert_close(mine.grad, a.grad, **CLOSE)


def test_options_that_are_not_supported_are_refused_by_name(build, tmp_path):
    config = peft.LoraConfig(r=4, alora_invocation_tokens=[1], target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[1\], which is not supported"):
        load_adapter(build("llama"), tmp_path / "a")


@torch.no_grad()
@pytest.mark.parametrize("kind", [LoRA, AdaLoRA, LoHa, LoKr, VeRA, RandLoRA, MiSS, OFT, BOFT, IA3, SparseTuning])
def test_an_option_that_a_folder_leaves_out_is_what_peft_takes_for_it(kind):
    """Files by hand, and those of older versions, do not name every option."""
    config = {"peft_type": kind.peft_type, "target_modules": ["q_proj"]}
    theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind.peft_type](
        target_modules=["q_proj"], **_NEEDED.get(kind, {})
    )
    ours = method_from_peft(config)
    # where things started, and names for other things that train, say nothing of what is in the file
    others = {"target_modules", "projection_prng_key", "random_seed", "total_step"}
    for option in {f.name for f in dataclasses.fields(ours)} & {f.name for f in dataclasses.fields(theirs)} - others:
        assert getattr(ours, option) == getattr(theirs, option), option


@torch.no_grad()
def test_names_that_another_model_would_have_are_passed_over_in_a_folder_of_peft(build, call, tmp_path):
    """PEFT lists names for every model of a kind, and takes no notice of those that it does not find."""
    options = {"target_modules": ["q_proj", "qkv"], "exclude_modules": ["lm_head", "score"], "init_lora_weights": False}
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, **options)).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = build("llama")
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(call(model, "llama"), call(theirs, "llama"), **CLOSE)
    with pytest.raises(ValueError, match="'q_proj' matches no module"):
        load_adapter(build("bert"), tmp_path / "a")


def test_butterfly_factors_that_peft_left_out_are_told_from_what_its_folder_says(build, tmp_path):
    """Without its extension for a GPU peft trains one factor, and writes the number that it was asked for."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj"])
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"boft_R is \(1, 8, 4, 4\), expected \(2, 8, 4, 4\)"):
        load_adapter(build("llama"), tmp_path / "a")


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (peft.VeraConfig, {"r": 5, "d_initial": 0.3}),
        (peft.RandLoraConfig, {"r": 6, "sparse": True}),
        (peft.RandLoraConfig, {"r": 6, "very_sparse": True}),
    ],
    ids=["vera", "randlora_sparse", "randlora_very_sparse"],
)
def test_what_a_folder_of_peft_leaves_out_is_drawn_from_its_seed(kind, options, name, build, call, perturb, tmp_path):
    targets = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj", "up_proj"]}
    config = kind(target_modules=targets[name], save_projection=False, projection_prng_key=7, **options)
    theirs = peft.get_peft_model(build(name), config).eval()
    for key, parameter in theirs.named_parameters():
        if "lambda" in key or "gamma" in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "a")
    model = build(name)
    base = call(model, name)
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(call(model, name), call(theirs, name), **CLOSE)
    assert not torch.allclose(call(model, name), base, **CLOSE)


def test_dense_bases_that_peft_draws_by_what_the_machine_has_are_asked_for(build, tmp_path):
    config = peft.RandLoraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"randlora_A \(it was saved with save_projection=False; save it in peft"):
        load_adapter(build("llama"), tmp_path / "a")


def test_projections_that_a_folder_lacks_and_says_it_has_are_missed(build, tmp_path):
    peft.get_peft_model(
        build("llama"), peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    ).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(ValueError, match=r"2 missing, such as base_model.vera_A"):
        load_adapter(build("llama"), tmp_path / "a")


@pytest.mark.parametrize(
    "method",
    [TrainableTokens([3, 5]), LlamaAdapter(3), VeRA(r=4), RandLoRA(r=4), LoRA(r=2), IA3(), PromptTuning(3), OFT()],
    ids=lambda method: type(method).__name__,
)
def test_a_folder_has_no_field_that_pefts_class_lacks(method, build, tmp_path):
    adapt(build("llama"), method).save(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    known = dataclasses.fields(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type])
    assert written.keys() <= {f.name for f in known}
