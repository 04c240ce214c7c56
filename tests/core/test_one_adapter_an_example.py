"""Batches in which each example has an adapter of its own: each gets what it gets alone, or a clear refusal."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    IA3,
    Adapter,
    BottleneckAdapter,
    DeepPrompt,
    LlamaAdapter,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    Selective,
    VeRA,
    activate,
    active_adapters,
    adapt,
    adapter_names,
)
from tests.method_table import CASES, IDS, shown_data

NAMES = ["a", "b", "a", None, "b"]
# float32 products of the same numbers in batches of other sizes
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(name, rows):
    generator = torch.Generator().manual_seed(1)
    if name == "convnet":
        return {"x": torch.randn(rows, 3, 9, 9, generator=generator)}
    if name == "encoder":
        return {"x": torch.randn(rows, 6, 32, generator=generator)}
    if name == "volumes":
        return {"x": torch.randn(rows, 2, 5, 7, 6, generator=generator)}
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    ids = torch.randint(3, 97, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def run(model, batch):
    # a cache of each adapter's own cannot be put together
    no_cache = {"use_cache": False} if "input_ids" in batch else {}
    output = model(**batch, **no_cache)
    return output if isinstance(output, torch.Tensor) else output.logits


def alone(model, batch, names):
    """Each example by itself with its adapter."""
    outputs = []
    before = active_adapters(model)
    for row, name in enumerate(names):
        activate(model, *([] if name is None else [name]))
        outputs.append(run(model, {k: t[row : row + 1] for k, t in batch.items()}))
    activate(model, *before)
    return torch.cat(outputs)


def two(model, first, second, perturb):
    perturb(adapt(model, first, "a"), 0.1)
    torch.manual_seed(5)
    perturb(adapt(model, second, "b"), -0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("row", "name"), CASES, ids=IDS)
def test_each_example_gets_what_it_gets_alone(row, name, build, perturb):
    model = build(name)
    perturb(shown_data(adapt(model, row.make(), "a")), 0.1)
    if Adapter(model, "a").tree.record.in_place:
        with (
            pytest.raises(ValueError, match="of the base in place, for all examples alike"),
            adapter_names(model, ["a"]),
        ):
            pass
        return
    torch.manual_seed(5)
    perturb(shown_data(adapt(model, row.make(), "b")), -0.2)
    batch = inputs(name, len(NAMES))
    expected = alone(model, batch, NAMES)
    activate(model, "b")
    try:
        with adapter_names(model, NAMES):
            mixed = run(model, batch)
    except RuntimeError as error:
        if not str(error).startswith("one adapter an example: "):
            raise
        pytest.skip(str(error))
    torch.testing.assert_close(mixed, expected, **CLOSE)
    assert not torch.allclose(mixed, alone(model, batch, ["a"] * len(NAMES)), **CLOSE)


@torch.no_grad()
def test_methods_of_every_kind_share_a_batch(build, perturb):
    model = build("llama")
    methods = {
        "lora": LoRA(r=2),
        "ia3": IA3(),
        "bottleneck": BottleneckAdapter(reduction_factor=4),
        "parallel": BottleneckAdapter(reduction_factor=4, is_parallel=True),
        "vera": VeRA(r=4),
        "head": LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "prompt": PromptTuning(3),
        "gated": LlamaAdapter(3),
    }
    for by, (name, method) in enumerate(methods.items(), start=1):
        perturb(adapt(model, method, name), 0.05 * by)
    names = [*methods, None, "lora"]
    batch = inputs("llama", len(names))
    expected = alone(model, batch, names)
    with adapter_names(model, names):
        torch.testing.assert_close(run(model, batch), expected, **CLOSE)
    # one name for all is one adapter for all, without any parting
    with adapter_names(model, ["prompt"] * len(names)):
        torch.testing.assert_close(run(model, batch), alone(model, batch, ["prompt"] * len(names)), **CLOSE)


@torch.no_grad()
def test_the_base_runs_once_for_the_whole_batch(perturb):
    model = nn.Sequential(nn.Linear(4, 4))
    two(model, LoRA(r=2), LoRA(r=1), perturb)
    calls = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append("hook"))
    original = nn.functional.linear

    def counted(x, weight, bias=None):
        if weight is model[0].weight:
            calls.append(len(x))
        return original(x, weight, bias)

    nn.functional.linear, before = counted, nn.functional.linear
    try:
        with adapter_names(model, NAMES):
            model(torch.ones(5, 4))
    finally:
        nn.functional.linear = before
    assert calls == ["hook", 5]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", [LoRA(r=4), IA3(), BottleneckAdapter(reduction_factor=4)], ids=["lora", "ia3", "h"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_and_beams_gives_each_its_own_text(build, perturb, name, method, beams):
    model = build(name)
    two(model, method, method, perturb)
    for adapter in ("a", "b"):  # far enough apart that the texts differ
        for parameter in Adapter(model, adapter).parameters():
            parameter.mul_(4)
    ids = inputs(name, 3)["input_ids"]
    names = ["b", None, "a"]
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    expected = []
    for row, adapter in enumerate(names):
        activate(model, *([] if adapter is None else [adapter]))
        part = ids[row : row + 1]
        expected.append(model.generate(part, attention_mask=torch.ones_like(part), **options))
    activate(model, "a")
    with adapter_names(model, names, repeats=beams):
        mixed = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(mixed, torch.cat(expected))
    if beams > 1:
        with (
            adapter_names(model, names),
            pytest.raises(RuntimeError, match=r"with 9 rows along dim 0 for 3 names.*repeats=num_beams"),
        ):
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
def test_gradients_are_those_of_each_example_alone(build, perturb):
    model = build("bert")
    two(model, LoRA(r=2), LoRA(r=3), perturb)
    batch = inputs("bert", len(NAMES))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(alone(model, batch, NAMES).pow(2).sum())
    with adapter_names(model, NAMES):
        got = gradients(run(model, batch).pow(2).sum())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        checkpointed = gradients(run(model, batch).pow(2).sum())
    assert got.keys() == expected.keys() == checkpointed.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-5)


class Stack(nn.Module):
    """Linear layers under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_a_recomputation_inside_the_block_is_right_and_one_outside_raises(perturb):
    model = Stack()
    two(model, LoRA(r=2), LoRA(r=2), perturb)
    x = torch.randn(5, 8)
    for row, name in enumerate(NAMES):
        activate(model, *([] if name is None else [name]))
        loss = model(x[row : row + 1]).pow(2).sum()
        if name is not None:
            loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with adapter_names(model, NAMES):
        model(x).pow(2).sum().backward()
        late = model(x).sum()
        with adapter_names(model, ["b", "a", "b", None, "a"]):
            other = model(x).sum()
        with adapter_names(model, ["b", "b", "a", None, "a"]):
            otherwise_mixed = model(x).sum()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="different number of tensors was saved during the original forward"):
        late.backward()
    with adapter_names(model, NAMES), pytest.raises(RuntimeError, match="inside the adapter_names"):
        other.backward()
    with adapter_names(model, NAMES), pytest.raises(RuntimeError, match=r"Recomputed values .* different metadata"):
        otherwise_mixed.backward()


@torch.no_grad()
def test_threads_with_blocks_of_their_own_do_not_see_each_other(build, perturb):
    model = build("bert")
    two(model, LoRA(r=2), IA3(), perturb)
    batch = inputs("bert", len(NAMES))
    choices = [NAMES, list(reversed(NAMES)), [None] * 5, ["b"] * 5, ["b", "a", "a", "b", None]]
    expected = [alone(model, batch, names) for names in choices]
    plain = run(model, batch)
    together = threading.Barrier(len(choices) + 1)
    wrong = []

    @torch.no_grad()
    def serve(names, right):
        together.wait(10)
        for _ in range(15):
            with adapter_names(model, names):
                if not torch.allclose(run(model, batch), right, **CLOSE):
                    wrong.append(names)

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(choices, expected, strict=True)]
    for thread in threads:
        thread.start()
    together.wait(10)
    for _ in range(15):
        assert torch.equal(run(model, batch), plain)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model._modules["adapters"].switch.blocks == []


@torch.no_grad()
def test_a_block_ends_with_what_was_before_whatever_happens_in_it(build, call, perturb):
    model = build("bert")
    two(model, LoRA(r=2), IA3(), perturb)
    batch = inputs("bert", len(NAMES))
    before = run(model, batch)
    base = alone(model, batch, [None] * 5)
    with pytest.raises(KeyError), adapter_names(model, NAMES):
        raise KeyError
    assert torch.equal(run(model, batch), before)
    with adapter_names(model, NAMES):
        mixed = run(model, batch)
        with Adapter(model, "a").disabled():
            torch.testing.assert_close(run(model, batch), base, **CLOSE)
        twin = copy.deepcopy(model)
        assert torch.equal(run(model, batch), mixed)
        for change in (Adapter(model, "a").remove, Adapter(model, "b").merge, Adapter(model, "a").merge_and_unload):
            with pytest.raises(RuntimeError, match=r"is in use in an adapter_names\(\) block; leave that first"):
                change()
    assert torch.equal(run(model, batch), before)
    assert torch.equal(run(twin, batch), before)
    Adapter(twin, "a").remove()


@torch.no_grad()
def test_names_that_mean_nothing_are_refused(build, perturb):
    model = build("bert")
    two(model, LoRA(r=2), IA3(), perturb)
    for names, repeats, said in (
        (["a", "bb"], 1, "has no adapter 'bb'; did you mean 'b'"),
        ([], 1, "a name an example and repeats of 1 or more"),
        (["a"], 0, "but got \\['a'\\] and 0"),
    ):
        with pytest.raises(ValueError, match=said), adapter_names(model, names, repeats):
            pass
    with adapter_names(model, NAMES), pytest.raises(RuntimeError, match=r"a Linear was called with 3 rows .* 5 names"):
        run(model, inputs("bert", 3))
    activate(model, "a")
    Adapter(model, "a").merge()
    with pytest.raises(ValueError, match="'a' is merged"), adapter_names(model, ["a", "b"]):
        pass
    adapt(model, Selective(parameter_types=["norm"]), "norms")
    with pytest.raises(ValueError, match=r"'norms' trains .* in place"), adapter_names(model, ["b", "norms"]):
        pass


@torch.no_grad()
def test_what_cannot_be_parted_by_example_is_refused_by_name(build, perturb):
    model = build("llama")
    two(model, LoRA(r=2), PromptTuning(3), perturb)
    batch = inputs("llama", 2)
    with adapter_names(model, ["a", "b"]):
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM gives .* a DynamicCache of its own.*use_cache=False"):
            model(**batch)
        with pytest.raises(RuntimeError, match="a LlamaForCausalLM would have to share a DynamicCache"):
            model.generate(**batch, max_new_tokens=2)
        with pytest.raises(RuntimeError, match="a loss is such: pass no labels"):
            model(**batch, labels=batch["input_ids"], use_cache=False)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    two(attention, LoRA(r=2), LoRA(r=3), perturb)
    x = torch.randn(2, 2, 8)
    with adapter_names(attention, ["a", "b"]), pytest.raises(RuntimeError, match="does not have the batch first"):
        attention["attention"](x, x, x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "name"),
    [(LoReFT(r=2), "LoReFT"), (DeepPrompt(), "DeepPrompt"), (PrefixTuning(3), "PrefixTuning")],
)
def test_an_adapter_that_cannot_be_mixed_is_named_with_its_method(build, perturb, method, name):
    model = build("bert")
    two(model, LoRA(r=2), method, perturb)
    said = rf"the adapter 'b' \({name}\) cannot be mixed in a batch with others.*run its rows apart"
    with adapter_names(model, ["a", "b"]), pytest.raises(RuntimeError, match=said):
        run(model, inputs("bert", 2))


@torch.no_grad()
def test_a_refused_batch_names_the_adapters_at_the_module_and_the_way_out(perturb):
    model = nn.Sequential(nn.Embedding(9, 4))
    two(model, LoRA(r=2, target_modules=["0"]), LoRA(r=1, target_modules=["0"]), perturb)
    said = r"an Embedding was called with 3 rows .*'a' \(LoRA\) and 'b' \(LoRA\) have layers there, so run the rows of"
    with adapter_names(model, ["a", "b"]), pytest.raises(RuntimeError, match=said):
        model(torch.zeros(3, 2, dtype=torch.long))
    model = build_one_sided(perturb)
    with adapter_names(model, ["a", "b"]), pytest.raises(RuntimeError, match=r"'b' \(LoRA\) has a layer there, so run"):
        model(torch.zeros(3, 4))


def build_one_sided(perturb):
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 4))
    return two(model, LoRA(r=2, target_modules=["2"]), LoRA(r=1, target_modules=["1"]), perturb)


@torch.no_grad()
def test_a_loss_over_the_batch_is_that_of_its_outputs(build, perturb):
    model = build("llama")
    two(model, LoRA(r=2), VeRA(r=4), perturb)
    ids = inputs("llama", len(NAMES))["input_ids"]
    with adapter_names(model, NAMES):
        output = model(input_ids=ids, labels=ids)
    logits = alone(model, {"input_ids": ids}, NAMES)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    assert output.past_key_values.get_seq_length() == 7


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_leaves_its_graph_for_the_block_or_refuses(perturb):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    two(model, LoRA(r=2), LoRA(r=1), perturb)
    x = torch.randn(5, 4)
    expected = torch.cat(
        [Adapter(model, n).activate() or model(x[i : i + 1]) for i, n in enumerate(["a", "b", "a", "b", "b"])]
    )
    for fullgraph in (False, True):
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(x), model(x))
        with adapter_names(model, ["a", "b", "a", "b", "b"]):
            if fullgraph:
                with pytest.raises(Exception, match="a compiled model takes no adapter_names"):
                    compiled(x)
            else:
                torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), model(x))
        torch.compiler.reset()


def test_one_text_is_no_list_of_names(build):
    model = build("llama")
    adapt(model, LoRA(r=2), "lo")
    with (
        pytest.raises(TypeError, match=r"a list with an adapter for each example, but got 'lo'"),
        adapter_names(model, "lo"),
    ):
        pass
