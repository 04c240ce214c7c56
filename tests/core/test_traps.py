"""Each way in which adapting in place was seen to fail, most of them in silence."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM

from lightning_peft import Adapter, BottleneckAdapter, LoRA, PromptTuning, Selective, adapt, load_adapter
from lightning_peft.ops.lora_linear import calls


class Stack(nn.Module):
    """Linear layers under activation checkpointing."""

    def __init__(self, checkpointed: bool = True) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def _dispatched(model: nn.Module, offloaded: bool) -> nn.Module:
    from accelerate import cpu_offload, dispatch_model

    if offloaded:
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("offloaded", [True, False])
def test_an_adapter_works_on_a_dispatched_model_and_removal_puts_its_hooks_back(
    build, call, perturb, training, gradients, offloaded
):
    plain = build("llama")
    perturb(adapt(plain, LoRA(r=2)))
    expected = call(plain.train(training), "llama")
    model = _dispatched(build("llama"), offloaded)
    hooked = {n for n, m in model.named_modules() if "forward" in m.__dict__}
    assert hooked
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(call(model.train(training), "llama"), expected)
    adapter.remove()
    assert {n for n, m in model.named_modules() if "forward" in m.__dict__} == hooked


def test_the_class_of_an_adapted_model_makes_plain_ones(build, call, tmp_path):
    plain = build("bert")
    plain.save_pretrained(tmp_path / "base")
    model = build("bert")
    adapt(model, LoRA(r=2, target_modules=["query"]))
    made = [
        type(model).from_pretrained(tmp_path / "base"),
        type(model)(model.config),
        type(model.bert.encoder.layer[0].attention.self.query)(4, 4),
    ]
    assert [type(m) for m in made] == [type(plain), type(plain), nn.Linear]
    assert torch.equal(call(made[0].eval(), "bert"), call(plain, "bert"))
    assert inspect.signature(type(model)) == inspect.signature(type(plain))
    for again in made:
        adapt(again, LoRA(r=2)).remove()
        assert again.train(True).training


def test_a_forward_that_somebody_kept_goes_on_as_the_base_after_removal(perturb):
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    base = model(x)
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    kept = model[0].forward
    assert not torch.equal(kept(x), base)
    adapter.remove()
    assert torch.equal(kept(x), base)


def test_the_fused_path_runs_on_plain_linears_and_only_there():
    def ran(model, x=None):
        before = dict(calls)
        model(torch.randn(2, 4) if x is None else x)
        return {k: calls[k] - before[k] for k in ("fused", "beside")}

    plain = nn.Sequential(nn.Linear(4, 4))
    adapt(plain, LoRA(r=2))
    assert ran(plain) == {"fused": 1, "beside": 0}

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    subclass = nn.Sequential(Twice(4, 4))
    adapt(subclass, LoRA(r=2))
    assert ran(subclass) == {"fused": 0, "beside": 1}
    parametrized = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(parametrized[0], "weight", nn.Tanh())
    base = parametrized(torch.ones(1, 4))
    adapt(parametrized, LoRA(r=2))
    assert torch.equal(parametrized(torch.ones(1, 4)), base)
    assert ran(parametrized) == {"fused": 0, "beside": 1}
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].forward = lambda x: nn.functional.linear(x, hooked[0].weight) * 3
    base = hooked(torch.ones(1, 4))
    adapt(hooked, LoRA(r=2))
    assert torch.equal(hooked(torch.ones(1, 4)), base)
    assert ran(hooked) == {"fused": 0, "beside": 1}


def test_a_weight_on_another_device_is_never_read_by_the_fused_path():
    model = nn.Sequential(nn.Linear(4, 4))
    adapt(model, LoRA(r=2))
    model[0]._parameters["weight"] = nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    before = dict(calls)
    model(torch.ones(1, 4))  # F.linear takes the meta weight without a word
    assert calls["beside"] == before["beside"] + 1
    assert calls["fused"] == before["fused"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2, target_modules="all-linear"),
        LoRA(r=2, target_modules=["self_attn"]),
        LoRA(r=2, target_modules=["linear2"]),
        BottleneckAdapter(attention_modules=["self_attn"], feed_forward_modules=["linear2"]),
        Selective(parameter_types=["bias"]),
    ],
    ids=["all", "attention", "feed-forward", "bottleneck", "bias"],
)
def test_adapters_act_in_every_mode_of_torchs_encoder(build, perturb, method, training, gradients, padded):
    """Compared with the same encoder in training mode, which calls its parts."""
    model = build("encoder")
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    base = model(x, padding)
    perturb(adapt(model, method), 0.2)
    torch.testing.assert_close(model.eval()(x, padding).isnan().any(), torch.tensor(False))
    expected = model.train()(x, padding)
    with torch.set_grad_enabled(gradients):
        out = model.train(training)(x, padding)
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[real], base[real], atol=1e-4)


def test_lora_on_attention_is_the_attention_with_changed_weights(build, perturb):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    model = nn.ModuleDict({"attention": attention})
    adapter = adapt(model, LoRA(r=3, lora_alpha=5, target_modules=["attention"]))
    perturb(adapter, 0.3)
    tensors = {n: t.double() for n, t in adapter.state_dict().items()}
    other = nn.MultiheadAttention(16, 4, batch_first=True).double()
    state = dict(attention.state_dict())
    a, b = tensors["attention.lora_A"], tensors["attention.lora_B"]
    c, d = tensors["attention.out_proj.lora_A"], tensors["attention.out_proj.lora_B"]
    state["in_proj_weight"] = state["in_proj_weight"] + 5 / 3 * b @ a
    state["out_proj.weight"] = state["out_proj.weight"] + 5 / 3 * d @ c
    other.load_state_dict(state)
    for mode in (True, False):
        out, weights = model["attention"].train(mode)(x, x, x)
        expected, expected_weights = other.train(mode)(x, x, x)
        # the adapter is float32, so its product is rounded once
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)


def test_a_projection_that_attention_only_reads_is_refused_by_name(build):
    with pytest.raises(ValueError, match=r"self_attn.out_proj': MultiheadAttention reads its weights"):
        adapt(build("encoder"), LoRA(r=2, target_modules=["out_proj"]))
    different = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, kdim=8, vdim=8)})
    with pytest.raises(ValueError, match="kdim and vdim must equal embed_dim"):
        adapt(different, LoRA(r=2))
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        adapt(build("encoder"), LoRA(r=2, lora_dropout=0.1))


def test_what_a_state_space_mixer_reads_past_the_forward_is_left_out_and_refused_by_name():
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    adapter = adapt(model, LoRA(r=2))
    assert list(adapter.tree.layers_by_module) == ["backbone.layers.0.mixer.in_proj"]
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapter.remove()
    with pytest.raises(ValueError, match=r"mixer.dt_proj': MambaMixer reads its weights .* name \S+mixer.in_proj"):
        adapt(model, LoRA(r=1, target_modules=["in_proj", "dt_proj"]))


def test_gradients_under_checkpointing_are_those_without(perturb):
    gradients = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = Stack(checkpointed)
        adapter = adapt(model, LoRA(r=2))
        perturb(adapter)
        model(torch.ones(2, 8)).pow(2).sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "method", [LoRA(r=2), BottleneckAdapter(attention_modules=r"layers\.\d", output_adapter=False)]
)
def test_a_recomputation_with_other_adapters_raises(method, perturb):
    model = Stack()
    perturb(adapt(model, method, "a"))
    perturb(adapt(model, method, "b"), 0.3)
    loss = model(torch.ones(2, 8)).sum()
    Adapter(model, "a").activate()
    with pytest.raises(RuntimeError, match=r"recomputed a forward with the adapters \['a'\] active"):
        loss.backward()
    loss = model(torch.ones(2, 8)).sum()
    with Adapter(model, "a").disabled():
        model(torch.ones(2, 8))
    loss.backward()


def test_a_forward_sees_the_old_adapters_or_the_new_ones_never_both():
    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.inside, self.go = threading.Event(), threading.Event()

        def forward(self, x):
            x = self.first(x)
            self.inside.set()
            assert self.go.wait(10)
            return self.second(x)

    model = Waiting()
    model.go.set()
    adapter = adapt(model, LoRA(r=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3)
        x = torch.ones(1, 4)
        adapted = model(x)
        model.go.clear()
        model.inside.clear()
        seen = []
        serving = threading.Thread(target=lambda: seen.append(model(x).detach()))
        serving.start()
        assert model.inside.wait(10)
        with adapter.disabled():
            model.go.set()
            serving.join()
    assert torch.equal(seen[0], adapted)


def test_save_pretrained_on_an_adapted_model_refuses_and_says_what_to_call(build, tmp_path):
    model = build("bert")
    adapter = adapt(model, LoRA(r=2))
    with pytest.raises(RuntimeError, match=r"adapter.save\(folder\).*merge_and_unload"):
        model.save_pretrained(tmp_path / "a")
    adapter.merge_and_unload().save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").exists()


def test_an_adapted_class_keeps_its_name_and_signature(build):
    model = build("bert")
    cls = type(model)
    signature = inspect.signature(model.forward)
    adapt(model, LoRA(r=2))
    assert type(model) is not cls
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__qualname__) == (cls.__name__, cls.__qualname__)
    assert type(model).__module__ == cls.__module__
    assert inspect.signature(model.forward) == signature


def test_a_sequential_root_keeps_its_length_and_items(perturb):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = list(model)
    perturb(adapt(model, LoRA(r=2)))
    assert len(model) == 3
    assert list(model) == layers
    assert model[-1] is layers[-1]
    assert len(model[:2]) == 2
    assert model(torch.ones(1, 4)).shape == (1, 2)


def test_a_root_that_has_an_attribute_called_adapters_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.adapters = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="already has an attribute 'adapters'"):
        adapt(model, LoRA(r=1))


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "layers"])
def test_modules_with_unlucky_names_are_adapted_and_saved(name, tmp_path, perturb):
    def make():
        torch.manual_seed(0)
        model = nn.Module()
        model.inner = nn.Module()
        model.inner._modules[name] = nn.Linear(4, 4)
        return model

    model = make()
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    assert set(adapter.state_dict()) == {f"inner.{name}.lora_A", f"inner.{name}.lora_B"}
    adapter.save(tmp_path / "a")
    fresh = make()
    load_adapter(fresh, tmp_path / "a")
    x = torch.ones(1, 4)
    assert torch.equal(fresh.inner._modules[name](x), model.inner._modules[name](x))


def test_batch_norm_statistics_of_a_frozen_base_stand_still(build, call):
    model = build("convnet")
    adapter = adapt(model, LoRA(r=2, target_modules=["conv1"]))
    before = model.norm.running_mean.clone()
    model.train()
    call(model, "convnet")
    assert torch.equal(model.norm.running_mean, before)
    adapter.remove()
    model.train()
    call(model, "convnet")
    assert not torch.equal(model.norm.running_mean, before)


def test_merging_an_embedding_leaves_the_tied_head_alone(build, call, perturb):
    model = build("gpt2")
    head = model.lm_head.weight
    adapter = adapt(model, LoRA(r=2, target_modules=["wte"]))
    perturb(adapter)
    adapted = call(model, "gpt2")
    adapter.merge()
    torch.testing.assert_close(call(model, "gpt2"), adapted, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is head
    adapter.unmerge()
    assert model.transformer.wte.weight is head


def test_an_adapter_with_a_nan_is_not_merged(build, call):
    model = build("bert")
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("adapters")}
    adapter = adapt(model, LoRA(r=2))
    with torch.no_grad():
        adapter.parameters()[-1].fill_(float("nan"))
    with pytest.raises(ValueError, match="is not finite; the base is left as it is"):
        adapter.merge()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


@pytest.mark.slow
def test_an_adapted_model_compiles_as_one_graph_with_its_backward(perturb):
    model = Stack(checkpointed=False)
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    x = torch.randn(2, 8)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.slow
def test_an_adapted_model_exports(perturb):
    model = Stack(checkpointed=False).eval()
    perturb(adapt(model, LoRA(r=2)))
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_prompts_with_a_static_cache_are_refused_by_name(build):
    model = build("llama")
    adapt(model, PromptTuning(4))
    with pytest.raises(ValueError, match=r"StaticCache: its size was computed without|static caches"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, cache_implementation="static", do_sample=False)


def test_resized_embeddings_and_tied_weights_go_with_an_adapter(build, call, perturb):
    model = build("gpt2")
    adapter = adapt(model, LoRA(r=2))
    perturb(adapter)
    adapted = call(model, "gpt2")
    model.resize_token_embeddings(101)
    model.tie_weights()
    torch.testing.assert_close(call(model, "gpt2")[..., :97], adapted)
    adapter.remove()
    assert model.lm_head.weight is model.transformer.wte.weight
