"""LLaMA-Adapter: the paper's formula, the models that it knows, and the same numbers as Hugging Face PEFT."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import Adapter, LlamaAdapter, LoRA, adapt, load_adapter
from lightning_peft.methods import llama_adapter

ROW = torch.tensor([[5, 6, 7]])


def _in_double(model, adapter):
    model.double()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "biased"])
def test_attention_gives_what_the_papers_formula_gives(build, perturb, name):
    """Head by head: what the text's scores give, plus the gate times what the prompt's scores give, through W_o."""
    if name == "biased":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97, attention_bias=True)
        model = LlamaForCausalLM(config).eval()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    else:
        model = build(name)
    adapter = adapt(model, LlamaAdapter(adapter_len=4))
    perturb(adapter, 0.5)
    _in_double(model, adapter)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    angles = torch.randn(2, 5, 8, dtype=torch.float64)
    # the two halves of a head turn together
    cos, sin = (f(angles[..., :4]).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    got, _ = attention(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
    state = adapter.state_dict()
    prompt, gate = (state[f"model.layers.0.self_attn.adaption_{what}"] for what in ("prompt", "gate"))

    def normed(vector, which):
        norm = getattr(attention, f"{which}_norm", None)
        return vector if norm is None else norm(vector)

    def turned(vector, batch, token):
        halves = torch.cat([-vector[4:], vector[:4]])
        return vector * cos[batch, token] + halves * sin[batch, token]

    def head(projected, number):
        return projected[number * 8 : number * 8 + 8]

    expected = torch.zeros_like(x)
    for batch in range(2):
        for token in range(5):
            read = []
            for number in range(4):
                q = turned(normed(head(attention.q_proj(x[batch, token]), number), "q"), batch, token)
                seen = range(token + 1)
                keys = [normed(head(attention.k_proj(x[batch, t]), number // 2), "k") for t in seen]
                keys = [turned(k, batch, t) for k, t in zip(keys, seen, strict=True)]
                values = [head(attention.v_proj(x[batch, t]), number // 2) for t in seen]
                text = F.softmax(torch.stack(keys) @ q / 8**0.5, 0) @ torch.stack(values)
                keys = [normed(head(attention.k_proj(p), number // 2), "k") for p in prompt[0]]
                values = [head(attention.v_proj(p), number // 2) for p in prompt[0]]
                read.append(text + gate * (F.softmax(torch.stack(keys) @ q / 8**0.5, 0) @ torch.stack(values)))
            expected[batch, token] = attention.o_proj(torch.cat(read))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "llama_classifier"])
def test_the_model_starts_as_the_base_to_the_bit(build, name):
    model = build(name)
    base = model(input_ids=ROW).logits
    adapt(model, LlamaAdapter())
    assert torch.equal(model(input_ids=ROW).logits, base)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Granite"]
)
def test_the_prompt_is_read_with_the_very_queries_of_the_text(kind, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=97)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    adapt(model, LlamaAdapter(adapter_len=4))
    seen = []
    attention, gated = F.scaled_dot_product_attention, llama_adapter.gated_attention

    def text(q, k, v, **options):
        seen.append((q, options["scale"]))
        return attention(q, k, v, **options)

    def prompt(q, k, v, gate, scale):
        seen.append((q, scale))
        return gated(q, k, v, gate, scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", text)
    monkeypatch.setattr(llama_adapter, "gated_attention", prompt)
    model(input_ids=ROW)
    (own, own_scale), (ours, scale) = seen
    assert torch.equal(own, ours)
    assert scale == own_scale


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_padding_and_caches_change_nothing(build, perturb, name):
    model = build(name)
    perturb(adapt(model, LlamaAdapter(adapter_len=4)), 0.5)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), ROW], 1)
    mask = (ids != 0).long()
    alone = model(input_ids=ROW).logits
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
    settings = {"attention_mask": torch.ones_like(ROW), "max_new_tokens": 8, "do_sample": False}
    written = [model.generate(input_ids=ROW, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_under_checkpointing_are_those_without(build, perturb, name):
    model = build(name)
    adapter = adapt(model, LlamaAdapter(adapter_len=4))
    perturb(adapter)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=ROW).logits.pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_16_bit_model_runs_with_float32_prompts(build, perturb):
    model = build("llama")
    perturb(adapt(model, LlamaAdapter()), 0.5)
    expected = model(input_ids=ROW).logits
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(input_ids=ROW).logits.float(), expected, rtol=0.1, atol=0.05)


def test_the_upper_layers_are_counted_from_the_top(build):
    model = build("llama")
    adapter = adapt(model, LlamaAdapter(adapter_layers=1))
    assert {k.rpartition(".")[0] for k in adapter.state_dict()} == {"model.layers.1.self_attn"}
    with pytest.raises(ValueError, match="adapter_layers=3, but LlamaForCausalLM has 2 attention modules"):
        adapt(build("llama"), LlamaAdapter(adapter_layers=3))


def test_what_is_not_known_is_refused_by_name(build):
    for name in ("bert", "t5", "convnet"):
        with pytest.raises(ValueError, match=r"of Llama's kind .* PrefixTuning knows more models"):
            adapt(build(name), LlamaAdapter())
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp', a LlamaMLP; expected the self-attention"):
        adapt(build("llama"), LlamaAdapter(target_modules="mlp"))
    with pytest.raises(ValueError, match="'self_atn' matches no module; did you mean 'self_attn'"):
        adapt(build("llama"), LlamaAdapter(target_modules="self_atn"))
    for options, message in (
        ({"adapter_len": 0}, "adapter_len must be 1 or more"),
        ({"adapter_layers": 0}, "adapter_layers must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaAdapter(**options)


@torch.no_grad()
def test_it_goes_with_an_adapter_on_the_projections(build, perturb):
    model = build("llama")
    perturb(adapt(model, LoRA(r=2, target_modules=["q_proj", "o_proj"]), "lora"))
    lora = model(input_ids=ROW).logits
    adapt(model, LlamaAdapter(), "prompts")
    model.adapters.switch.active = ("lora", "prompts")
    # the gates are still shut
    assert torch.equal(model(input_ids=ROW).logits, lora)
    perturb(Adapter(model, "prompts"), 0.5)
    with_both = model(input_ids=ROW).logits
    assert not torch.allclose(with_both, lora, atol=1e-3)
    model.adapters.switch.active = ("prompts",)
    assert not torch.allclose(model(input_ids=ROW).logits, with_both, atol=1e-3)


peft = pytest.importorskip("peft")


@pytest.fixture
def exact(monkeypatch):
    """Lets peft's softmax keep float64; it rounds to float32 whatever comes in."""
    layer = pytest.importorskip("peft.tuners.adaption_prompt.layer")
    monkeypatch.setattr(layer, "F", SimpleNamespace(softmax=lambda scores, dim, dtype: F.softmax(scores, dim)))


def _peer(build, name):
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(build(name).double(), config).double().eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_ten_steps_give_the_losses_and_the_parameters_of_peft(build, call, perturb, exact, name):
    ours, theirs = build(name), _peer(build, name)
    adapter = adapt(ours, LlamaAdapter(adapter_len=4))
    perturb(adapter, 0.5)
    _in_double(ours, adapter)
    pairs = {f"base_model.model.{k}": t for k, t in adapter.state_dict().items()}
    named = {k: p for k, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == pairs.keys()
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(pairs[key])
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        seen = []
        for _ in range(10):
            output = call(model, name)
            loss = output.pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    for key, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, named[f"base_model.model.{key}"].data, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_output_is_that_of_peft(build, call, perturb, exact, name, tmp_path):
    ours = build(name)
    adapter = adapt(ours, LlamaAdapter(adapter_len=4, adapter_layers=1))
    perturb(adapter, 0.5)
    adapter.save(tmp_path / "a")
    _in_double(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").double().eval()
    torch.testing.assert_close(call(ours, name), call(theirs, name), rtol=1e-10, atol=1e-10)
    again = build(name)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(call(again, name).double(), call(theirs, name), rtol=1e-5, atol=1e-5)
