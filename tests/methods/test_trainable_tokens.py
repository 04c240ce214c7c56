"""Trained rows of the embedding: everywhere that its weight is read, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, TrainableTokens, adapt, load_adapter
from lightning_peft.core.activation import activate
from lightning_peft.formats.merged import save_merged
from tests.conftest import SIZES

TOKENS = [14, 50, 9, 0]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def _masked_bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, vocab_size=97, max_position_embeddings=64))


def _tied_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=97, pad_token_id=0, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def _gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, vocab_size=97))


def _bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDES.items()}
    config = BartConfig(d_model=32, vocab_size=97, max_position_embeddings=64, scale_embedding=True, **sizes)
    return BartForConditionalGeneration(config)


SIDES = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
TIED = {"masked_bert": _masked_bert, "tied_llama": _tied_llama, "gemma": _gemma, "bart": _bart}


@pytest.fixture
def build(build):
    """The common models, and more whose head is tied to the embedding."""

    def make(name):
        if name not in TIED:
            return build(name)
        torch.manual_seed(0)
        model = TIED[name]().eval()
        with torch.no_grad():  # the masked model's bias is zero at first
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


@pytest.fixture
def call(call):
    def run(model, name, rows=2):
        return call(model, "t5" if name == "bart" else name, rows)

    return run


def _rows(hidden=32):
    return torch.randn(len(TOKENS), hidden, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _adapted(model, method):
    model.double()
    adapter = adapt(model, method)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()
    return adapter


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", *TIED])
def test_the_model_is_one_whose_embedding_has_the_trained_rows(name, build, call):
    """The same output and the same gradients as a base with these rows written into its one shared weight."""
    rows = _rows()
    changed = build(name).double()
    weight = changed.get_input_embeddings().weight
    with torch.no_grad():
        weight[TOKENS] = rows
    expected = call(changed, name)
    expected.pow(2).mean().backward()

    model = build(name)
    adapter = _adapted(model, TrainableTokens(TOKENS))
    (trained,) = adapter.parameters()
    trained.data.copy_(rows)
    output = call(model, name)
    output.pow(2).mean().backward()
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(trained.grad, weight.grad[TOKENS], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5", *TIED])
def test_the_rows_are_one_parameter_and_are_saved_once(name, build, call, perturb, tmp_path):
    model = build(name)
    base = call(model, name)
    adapter = adapt(model, TrainableTokens(TOKENS))
    assert torch.equal(call(model, name), base)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(4, 32)]
    assert len(adapter.state_dict()) == 1
    perturb(adapter)
    adapter.save(tmp_path / "a")
    fresh = build(name)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(call(fresh, name), call(model, name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5", "masked_bert", "tied_llama", "gemma"])
def test_merging_changes_the_tied_weight_once_and_leaves_it_tied(name, build, call, perturb, tmp_path):
    model = build(name)
    adapter = adapt(model, TrainableTokens(TOKENS))
    perturb(adapter)
    adapted = call(model, name)
    save_merged(model, "default", tmp_path / "merged")
    adapter.merge()
    torch.testing.assert_close(call(model, name), adapted, rtol=1e-5, atol=1e-6)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    (rows,) = adapter.parameters()
    torch.testing.assert_close(model.get_input_embeddings().weight[TOKENS], rows, rtol=1e-6, atol=1e-6)
    reloaded = type(model).from_pretrained(tmp_path / "merged").eval()
    assert reloaded.config.tie_word_embeddings
    torch.testing.assert_close(call(reloaded, name), adapted, rtol=1e-5, atol=1e-6)
    adapter.unmerge()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def test_a_lora_on_one_end_of_a_tie_still_merges_into_that_end_alone(build, call, perturb):
    model = build("gpt2")
    adapter = adapt(model, LoRA(r=2, target_modules=["wte"]))
    perturb(adapter)
    adapted = call(model, "gpt2")
    adapter.merge()
    assert model.lm_head.weight is not model.transformer.wte.weight
    torch.testing.assert_close(call(model, "gpt2"), adapted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_two_adapters_with_tokens_of_their_own_act_together(build, call):
    rows = _rows()
    both = build("gpt2").double()
    both.transformer.wte.weight[TOKENS] = rows
    model = build("gpt2")
    for name, part in (("first", slice(0, 2)), ("second", slice(2, 4))):
        adapter = adapt(model.double(), TrainableTokens(TOKENS[part]), name)
        for parameter in adapter.parameters():
            parameter.data = rows[part].clone()
    activate(model, "first", "second")
    torch.testing.assert_close(call(model, "gpt2"), call(both, "gpt2"), **EXACT)


@torch.no_grad()
def test_a_half_precision_base_uses_the_rows_rounded_once_more_at_most(build, call, perturb):
    model = build("gpt2").bfloat16()
    adapter = adapt(model, TrainableTokens(TOKENS))
    perturb(adapter)
    (rows,) = adapter.parameters()
    ids = torch.tensor(TOKENS)
    torch.testing.assert_close(model.transformer.wte(ids).float(), rows, rtol=2**-7, atol=1e-3)
    assert model.transformer.wte(ids).dtype == torch.bfloat16


def test_a_padding_row_that_trains_gets_no_gradient_from_the_lookup():
    """As in the embedding itself, and at its own place among the chosen ones."""
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=3))
    (rows,) = adapt(model, TrainableTokens([5, 3], target_modules=["0"])).parameters()
    model(torch.tensor([[3, 5, 7]])).sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_one_weight_named_at_both_ends_is_still_trained_once(build):
    model = build("gpt2")
    adapter = adapt(model, TrainableTokens([5], target_modules=["lm_head", "wte"]))
    assert list(adapter.state_dict()) == ["transformer.wte.trainable_tokens_delta"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_indices": [3, 3]}, "each token once, but 3 stands twice"),
        ({"token_indices": [-1]}, "0 or more, but -1 is among them"),
        ({"token_indices": [True]}, r"a list of whole numbers, but got \[True\]"),
        ({"token_indices": ["the"]}, r"a list of whole numbers, but got \['the'\]"),
        ({"token_indices": [1], "learning_rate": 0}, "learning_rate must be above 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TrainableTokens(**options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gpt2", {"token_indices": []}, "token_indices is empty"),
        ("gpt2", {"token_indices": [97]}, r"97 is beyond 'transformer.wte', which has the tokens 0 to 96"),
        ("gpt2", {"token_indices": [1], "target_modules": ["ln_f"]}, "expected Embedding or Linear"),
        ("gpt2", {"token_indices": [1], "modules_to_save": ["lm_head"]}, "'lm_head' reads the trained rows"),
        ("convnet", {"token_indices": [1]}, r"needs exactly one module with get_input_embeddings\(\)"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(name, options, said, build):
    model = build(name)
    with pytest.raises(ValueError, match=said):
        adapt(model, TrainableTokens(**options))
    assert not hasattr(model, "adapters")


def test_an_embedding_that_rescales_its_rows_or_has_none_in_memory_is_refused():
    method = TrainableTokens([1], target_modules=["0"])
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        adapt(nn.Sequential(nn.Embedding(10, 4, max_norm=1.0)), method)
    with pytest.raises(ValueError, match="neither quantized nor offloaded"):
        adapt(nn.Sequential(nn.Embedding(10, 4, device="meta")), method)


def test_a_tied_module_of_another_kind_is_refused():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Bilinear(1, 1, 1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'1', a Bilinear, is to read trained rows"):
        adapt(model, TrainableTokens([1], target_modules=["0"]))


def test_a_tied_copy_in_a_file_that_says_something_else_is_refused(build, tmp_path):
    from safetensors.torch import load_file, save_file

    adapt(build("gpt2"), TrainableTokens([5])).save(tmp_path / "a")
    (tmp_path / "a" / "lightning_peft.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    (tensor,) = load_file(file).values()
    owner, copy = (f"base_model.model.{n}.trainable_tokens_delta" for n in ("transformer.wte", "lm_head"))
    save_file({owner: tensor, copy: tensor.clone()}, file)
    load_adapter(build("gpt2"), tmp_path / "a")
    save_file({owner: tensor, copy: tensor + 1}, file)
    with pytest.raises(ValueError, match=r"1 unexpected, such as base_model.model.lm_head"):
        load_adapter(build("gpt2"), tmp_path / "a")


@torch.no_grad()
def test_lora_trains_rows_beside_its_matrices_and_merges_both(build, call, perturb):
    model = build("gpt2")
    adapter = adapt(model, LoRA(r=2, trainable_token_indices=TOKENS))
    rows = [n for n in adapter.state_dict() if n.endswith("trainable_tokens_delta")]
    assert rows == ["transformer.wte.trainable_tokens_delta"]
    perturb(adapter)
    adapted = call(model, "gpt2")
    adapter.merge()
    torch.testing.assert_close(call(model, "gpt2"), adapted, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trainable_token_indices": [3], "target_modules": ["wte"]}, r"'transformer\.wte' has trained rows"),
        ({"trainable_token_indices": {"wte": [3], "lm_head": [4]}}, "has trained rows .trainable_token_indices."),
        ({"trainable_token_indices": {"wte": []}}, "token_indices is empty"),
        ({"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}, "LoRA: 'lm_head' reads the trained rows"),
    ],
)
def test_rows_that_lora_cannot_have_are_refused(options, said, build):
    with pytest.raises(ValueError, match=said):
        adapt(build("gpt2"), LoRA(r=2, **options))


def test_a_token_that_stands_twice_in_a_lora_is_refused():
    with pytest.raises(ValueError, match="trainable_token_indices must name each token once, but 3 stands twice"):
        LoRA(trainable_token_indices={"wte": [3, 3]})


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"embed": [1]}, "trainable_token_indices: 'embed' matches no module; did you mean 'embed_tokens'"),
        ({"norm": [1]}, "trainable_token_indices: 'norm' matches 'model.norm', a LlamaRMSNorm; expected Embedding or"),
        ([99999], "trainable_token_indices: 99999 is beyond 'model.embed_tokens'"),
        ([], "trainable_token_indices is empty"),
    ],
)
def test_what_is_wrong_with_rows_beside_lora_is_said_of_loras_option(build, tokens, said):
    with pytest.raises(ValueError, match=said):
        adapt(build("llama"), LoRA(r=2, trainable_token_indices=tokens))
