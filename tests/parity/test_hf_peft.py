"""The same numbers and the same files as Hugging Face PEFT."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import LoRA, PromptTuning, PTuning, adapt, load_adapter

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
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


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_base_trains_as_it_does_in_peft(start, build, call):
    """PEFT subtracts the start from the base, we beside it: the same outputs, losses and factors."""
    ours, plain = build("llama"), build("llama").double()
    adapter = adapt(ours, LoRA(r=4, lora_alpha=6, init_lora_weights=start))
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules="all-linear")
    theirs = peft.get_peft_model(build("llama"), config).double()
    ours.double()
    for tensor in [*adapter.parameters(), *adapter.tree.buffers()]:
        tensor.data = tensor.data.double()
    for name in adapter.tree.layers_by_module:
        layer = theirs.get_submodule(f"base_model.model.{name}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # peft takes the difference in float32
        layer.base_layer.weight.data = plain.get_submodule(name).weight.data - 1.5 * b.data @ a.data
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        seen = []
        for _ in range(10):
            loss = call(model, "llama").pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    trained = peft.get_peft_model_state_dict(theirs)
    for key, tensor in adapter.state_dict().items():
        if not key.endswith("0"):
            theirs_now = trained[f"base_model.model.{key}.weight"]
            torch.testing.assert_close(tensor, theirs_now, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_trains_as_it_does_in_peft(kind, name, build, call):
    options = {"num_virtual_tokens": 4, "encoder_hidden_size": 6, "encoder_reparameterization_type": kind}
    ours = build(name)
    adapter = adapt(ours, PTuning(**options))
    ours.double()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = peft.PromptEncoderConfig(task_type=task, num_transformer_submodules=1, **options)
    theirs = peft.get_peft_model(build(name).double(), config).double()
    network = theirs.prompt_encoder["default"]
    named = {"virtual": network.embedding.weight}
    heads = {"encoder.head.": network.mlp_head, "encoder.lstm.": getattr(network, "lstm_head", None)}
    heads = heads if kind == "LSTM" else {"encoder.": network.mlp_head}
    named |= {prefix + n: p for prefix, part in heads.items() for n, p in part.named_parameters()}
    pairs = {k: named[k[k.index("virtual" if "virtual" in k else "encoder.", 8) :]] for k in adapter.state_dict()}
    with torch.no_grad():
        for key, tensor in adapter.state_dict().items():
            pairs[key].copy_(tensor)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for _ in range(10):
            loss = call(model, name)[:, -7:].pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    for key, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, pairs[key].data, rtol=1e-8, atol=1e-8)


def test_options_that_are_not_supported_are_refused_by_name(build, tmp_path):
    config = peft.LoraConfig(r=4, alora_invocation_tokens=[1], target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[1\], which is not supported"):
        load_adapter(build("llama"), tmp_path / "a")
