"""EVA's start: what a library that computes it apart gives, and what a Trainer does with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, adapt, load_adapter
from lightning_peft.methods.lora_eva import Components

EVA = LoRA(r=4, lora_alpha=6, init_lora_weights="eva")


def _batches(count, rows=6):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 97, (rows, 9), generator=generator)} for _ in range(count)]


def test_the_directions_of_many_batches_are_those_of_all_rows_together():
    torch.manual_seed(0)
    rows = torch.randn(300, 4) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0])) @ torch.randn(4, 12) + 3
    rows += 0.01 * torch.randn(300, 12)
    components = Components(4)
    for batch in rows.split(60):
        components.update(batch)
    exact = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False).Vh[:4].float()
    assert components.found
    # what lies beyond the kept directions is forgotten between batches: noise of 0.01 beside strengths of 1 and more
    torch.testing.assert_close((components.directions * exact).sum(1).abs(), torch.ones(4), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_padding_says_nothing_of_the_main_directions(name, build):
    ids = _batches(1)[0]["input_ids"]
    padding = torch.zeros(len(ids), 20, dtype=torch.long)
    padded = torch.cat([ids, padding], 1)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    found = []
    for read in (ids, padded):
        model = build(name)
        adapter = adapt(model, EVA)
        adapter.prepare([lambda m=model, r=read: m(input_ids=r, attention_mask=(r != 0).long(), **more).logits.sum()])
        found.append({k: t for k, t in adapter.state_dict().items() if k.endswith("lora_A") and "pooler" not in k})
    for key, directions in found[0].items():
        if "EncDecAttention.k" in key or "EncDecAttention.v" in key:  # the mask around them is the decoder's
            continue
        torch.testing.assert_close((directions @ found[1][key].T).abs(), torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_starts_where_it_starts_in_peft(build):
    peft = pytest.importorskip("peft")
    batches = _batches(3)
    models = [build("llama"), build("llama")]
    for model in models:  # what the first layer sees lies in four dimensions, which a sketch finds too
        torch.manual_seed(4)
        model.model.embed_tokens.weight.data = torch.randn(97, 4) @ torch.randn(4, 32)
    first = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    adapter = adapt(models[0], LoRA(r=4, lora_alpha=6, init_lora_weights="eva", **first))
    adapter.prepare((lambda b=b: models[0](**b).logits.sum()) for b in batches)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **first)
    theirs = peft.get_peft_model(models[1], config)
    peft.initialize_lora_eva_weights(
        theirs, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    state = peft.get_peft_model_state_dict(theirs)
    for key, tensor in adapter.state_dict().items():
        expected = state[f"base_model.model.{key}.weight"]
        if key.endswith("lora_A"):
            # the cosines of the angles between the two spaces
            torch.testing.assert_close(torch.linalg.svdvals(tensor @ expected.T), torch.ones(4), rtol=0, atol=1e-4)
        else:
            assert not tensor.any()
            assert not expected.any()


def test_the_model_still_starts_as_the_base_and_modules_with_one_input_share_a_start(build):
    model = build("llama")
    batches = _batches(2)
    with torch.no_grad():
        base = model(**batches[0]).logits
    adapter = adapt(model, EVA)
    model.train()
    adapter.prepare((lambda b=b: model(**b).logits.sum()) for b in batches)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(**batches[0]).logits, base)
    state = adapter.state_dict()
    attention = "model.layers.0.self_attn"
    assert torch.equal(state[f"{attention}.q_proj.lora_A"], state[f"{attention}.v_proj.lora_A"])
    rows = state["model.layers.1.mlp.down_proj.lora_A"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-5)


def test_data_is_seen_once(build, tmp_path):
    model = build("llama")
    adapter = adapt(model, EVA)
    adapter.save(tmp_path / "before")
    assert load_adapter(build("llama"), tmp_path / "before").needs_data
    assert adapter.needs_data
    adapter.prepare([lambda: model(**_batches(1)[0]).logits.sum()])
    with pytest.raises(RuntimeError, match="looks at no data, or has seen it"):
        adapter.prepare([])
    adapter.save(tmp_path / "a")
    assert not load_adapter(build("llama"), tmp_path / "a").needs_data


def test_batches_that_are_too_small_are_an_error(build):
    model = build("llama")
    adapter = adapt(model, EVA)
    with pytest.raises(ValueError, match=r"no batch gave 'model.layers.0.self_attn.q_proj' as many tokens"):
        adapter.prepare([lambda: model(input_ids=torch.tensor([[3, 4]])).logits.sum()])


def test_a_that_is_taken_from_data_may_stay_as_it_is(build):
    batches = _batches(3)
    started = {}
    for fixed in (False, True):
        model = build("llama")
        adapter = adapt(model, LoRA(r=4, lora_alpha=6, init_lora_weights="eva", lora_fa=fixed))
        drawn = {n: t.clone() for n, t in adapter.tree.state_dict().items()}
        adapter.prepare((lambda b=b, m=model: m(**b).logits.sum()) for b in batches)
        started[fixed] = {n: t.clone() for n, t in adapter.tree.state_dict().items()}
    for name, tensor in started[True].items():
        torch.testing.assert_close(tensor, started[False][name])
        assert torch.equal(tensor, drawn[name]) == name.endswith("lora_B")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    model(**batches[0]).logits.pow(2).mean().backward()
    optimizer.step()
    for name, tensor in adapter.tree.state_dict().items():
        assert torch.equal(tensor, started[True][name]) == name.endswith("lora_A"), name


def test_a_loop_that_trains_before_data_was_seen_is_told_what_to_call(build, tmp_path):
    model = build("llama")
    adapter = adapt(model, EVA)
    batch = _batches(1)[0]
    model(**batch)
    with pytest.raises(RuntimeError, match=r"takes A from data.*call adapter.prepare\(losses\) before the first"):
        model.train()(**batch)
    adapter.requires_grad_(False)
    model(**batch)
    adapter.requires_grad_(True)
    adapter.prepare([lambda: model(**batch).logits.sum()])
    seen = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    model(**batch).logits.pow(2).mean().backward()
    optimizer.step()
    for state in (seen, model.state_dict()):
        again = build("llama")
        adapt(again, EVA)
        again.load_state_dict(state)
        again.train()(**batch)


class Experts(nn.Module):
    """Its layers are called by keyword, and each batch goes to the first one and one of the others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.others = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, expert):
        return self.others[expert](input=self.first(input=x))


def test_layers_that_are_called_by_keyword_or_by_some_batches_alone_see_what_they_were_given():
    torch.manual_seed(0)
    model = Experts()
    batches = [(torch.randn(40, 12), expert) for expert in (0, 1, 0, 1)]
    adapter = adapt(model, LoRA(r=4, init_lora_weights="eva", target_modules=["others.0", "others.1"]))
    adapter.prepare((lambda b=b: model(*b).sum()) for b in batches)
    for expert in (0, 1):
        seen = Components(4)
        for x, where in batches:
            if where == expert and not seen.found:
                seen.update(model.first(x).detach())
        assert torch.equal(adapter.tree.layers_by_module[f"others.{expert}"].lora_A, seen.directions)


def test_a_layer_that_no_batch_reached_is_named():
    model = Experts()
    adapter = adapt(model, LoRA(r=4, init_lora_weights="eva", target_modules=["first", "others.2"]))
    with pytest.raises(ValueError, match=r"no batch reached 'others.2'"):
        adapter.prepare([lambda: model(torch.randn(40, 12), 0).sum()])
