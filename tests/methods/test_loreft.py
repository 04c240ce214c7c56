"""LoReFT's edits against the paper's formula, written plainly, and where they happen."""

from __future__ import annotations

import threading
from inspect import signature

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import LlamaForTokenClassification

from lightning_peft import LoReFT, PeftModule, adapt
from lightning_peft.core.in_place import base_tensors
from lightning_peft.core.per_forward import labels_of_batch
from lightning_peft.methods.loreft import orthonormal_rows
from lightning_peft.methods.positions import parse_positions

MODELS = ("bert", "roberta", "gpt2", "llama", "llama_classifier", "mistral", "qwen3", "t5")
STACKS = {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer", "gpt2": "transformer.h"}
STACKS |= dict.fromkeys(("llama", "llama_classifier", "mistral", "qwen3"), "model.layers") | {"t5": "encoder.block"}
ROW = [5, 6, 7, 8, 9]


def _batch(model, rows, side="right"):
    pad, longest = model.config.pad_token_id, max(map(len, rows))
    gaps = [[pad] * (longest - len(r)) for r in rows]
    ids = torch.tensor([g + r if side == "left" else r + g for r, g in zip(rows, gaps, strict=True)])
    more = {"decoder_input_ids": torch.full((len(rows), 2), 3)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), **more}


def _double(model, adapter):
    model.double()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()


def _papers(h, layer, group, places):
    """``h + R^T (W h + b - R h)`` at some places of one row."""
    r, w, b = orthonormal_rows(layer.rotation)[group], layer.weight[group], layer.bias[group]
    h = h.clone()
    for place in places:
        h[place] = h[place] + r.T @ (w @ h[place] + b - r @ h[place])
    return h


def _edit_by_hooks(model, name, layers, places):
    """Edits a plain model's layers; ``places`` has the prefix's and the suffix's positions of each row."""

    def hook(layer):
        def edit(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            last = layer.rotation.shape[0] - 1
            rows = [
                _papers(_papers(row, layer, 0, prefix), layer, last, suffix)
                for row, (prefix, suffix) in zip(h, places, strict=True)
            ]
            return (torch.stack(rows), *output[1:]) if isinstance(output, tuple) else torch.stack(rows)

        return edit

    for i, block in enumerate(model.get_submodule(STACKS[name])):
        block.register_forward_hook(hook(layers[f"{STACKS[name]}.{i}"]))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_that_of_the_papers_formula_at_the_ends_of_each_row(build, perturb, name, shared, side):
    model, plain = build(name), build(name).double()
    adapter = adapt(model, LoReFT(r=3, positions="f2+l3", share_weights=shared))
    perturb(adapter, 0.3)
    _double(model, adapter)
    rows = [[11, 12, 13, 14, 15, 16, 17], ROW, [21, 22, 23]]
    # a row of three is too short for five positions: one and two are left
    places = [([0, 1], [4, 5, 6]), ([0, 1], [2, 3, 4]), ([0], [1, 2])]
    if side == "left":
        gaps = [7 - len(r) for r in rows]
        places = [([p + g for p in a], [p + g for p in b]) for g, (a, b) in zip(gaps, places, strict=True)]
    _edit_by_hooks(plain, name, adapter.tree.layers_by_module, places)
    batch = _batch(model, rows, side)
    base = build(name).double()(**batch).logits
    out = model(**batch).logits
    torch.testing.assert_close(out, plain(**batch).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, base, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "prefix", "suffix"), [("f1", [0], []), ("l2", [], [3, 4]), ("all", range(5), [])]
)
def test_one_end_or_every_token_can_be_edited(build, perturb, positions, prefix, suffix):
    model, plain = build("llama"), build("llama").double()
    adapter = adapt(model, LoReFT(r=3, positions=positions, share_weights=False))
    perturb(adapter, 0.3)
    _double(model, adapter)
    _edit_by_hooks(plain, "llama", adapter.tree.layers_by_module, [(prefix, suffix)])
    batch = _batch(model, [ROW])
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_gives_what_the_row_alone_gives(build, perturb, name, side, positions):
    model = build(name)
    perturb(adapt(model, LoReFT(r=3, positions=positions)), 0.1)
    if side == "left" and name in ("bert", "roberta"):
        pytest.skip("the base itself reads its first position, which is padding")
    if side == "left" and name == "gpt2":
        positions = {"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])}
    else:
        positions = {}
    alone = model(**_batch(model, [ROW])).logits[0]
    both = model(**_batch(model, [ROW, [1 + t for t in [*ROW, 4, 3]]], side), **positions).logits[0]
    if both.shape != alone.shape:
        both = both[2:] if side == "left" else both[:5]
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["f1+l2", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5"])
def test_generation_edits_the_prompt_and_nothing_that_is_written(build, perturb, name, positions):
    model, plain = build(name), build(name)
    adapter = adapt(model, LoReFT(r=3, positions=positions))
    perturb(adapter, 0.3)
    layers, prompt = adapter.tree.layers_by_module, {"input_ids": torch.tensor([ROW])}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = model.generate(**prompt, attention_mask=torch.ones(1, 5), **settings)[0]
    if name == "t5":
        _edit_by_hooks(plain, name, layers, [([0], [3, 4]) if positions != "all" else (range(5), [])])
        expected = plain.generate(**prompt, attention_mask=torch.ones(1, 5), **settings)[0]
        assert torch.equal(written, expected)
        return
    for n in range(5, 11):
        twin = build(name)
        _edit_by_hooks(twin, name, layers, [([0], [3, 4]) if positions != "all" else (range(n), [])])
        assert twin(input_ids=written[:n].unsqueeze(0)).logits[0, -1].argmax() == written[n]
    left = model.generate(**_batch(model, [ROW, [*ROW, 4, 3]], "left"), **settings)[0, -6:]
    assert torch.equal(left, written[-6:])


def test_the_rows_stay_orthonormal_while_they_train(build, call):
    model = build("llama").train()
    adapter = adapt(model, LoReFT(r=5, positions="f1+l1", share_weights=False))
    layers = [m for n, m in adapter.tree.layers_by_module.items() if n]
    start = [orthonormal_rows(m.rotation.detach()) for m in layers]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(20):
        call(model, "llama").pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, before in zip(layers, start, strict=True):
        r = orthonormal_rows(layer.rotation.detach())
        torch.testing.assert_close(r @ r.mT, torch.eye(5).expand(2, 5, 5), rtol=0, atol=1e-5)
        assert (r - before).abs().max() > 0.01
        assert layer.rotation.dtype == torch.float32


def test_the_rows_have_right_gradients():
    matrix = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(orthonormal_rows, matrix)
    flipped = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)) @ matrix.detach()
    expected = orthonormal_rows(matrix.detach()) * torch.tensor([1.0, -1.0, 1.0]).double().unsqueeze(1)
    torch.testing.assert_close(orthonormal_rows(flipped), expected)


def _gradients(model, adapter, batch, elsewhere):
    # a wrapper around a layer would have the recomputation write into the cache once more
    cache = {"use_cache": False} if "past_key_values" in signature(model.forward).parameters else {}
    loss = model(**batch, **cache).logits.float().pow(2).mean()
    if elsewhere:  # as on a GPU, where the backward pass has a thread of its own
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        model(**_batch(model, [[4, 4]]), **cache)  # what another forward passed on in between must not count
        loss.backward()
    return {n: p.grad for n, p in zip(adapter.state_dict(), adapter.parameters(), strict=True)}


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_activation_checkpointing_changes_no_gradient(build, perturb, name, wrapped, elsewhere):
    found = []
    for checkpointed in (False, True):
        model = build(name)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        adapter = adapt(model, LoReFT(r=3, positions="f1+l2", share_weights=False))
        perturb(adapter)
        if checkpointed and wrapped:
            blocks = set(model.get_submodule(STACKS[name]))
            apply_activation_checkpointing(model, check_fn=lambda m, blocks=blocks: m in blocks)
        elif checkpointed:
            model.activation_checkpointing_enable()
        batch = _batch(model, [ROW, [3, 4, 5, 6, 7, 8, 9]], "left" if name == "llama" else "right")
        found.append(_gradients(model.train(), adapter, batch, elsewhere))
    for key, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointing_that_forgets_the_forward_is_refused(build):
    model = build("llama").train()
    adapt(model, LoReFT(r=3))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="checkpoint activations with use_reentrant=False"):
        model(**_batch(model, [ROW])).logits.mean().backward()


@torch.no_grad()
def test_threads_that_share_a_model_do_not_see_each_others_rows(build, perturb):
    model = build("llama")
    perturb(adapt(model, LoReFT(r=3, positions="f1+l1")), 0.3)
    batches = [_batch(model, [ROW, list(range(3, 3 + n))], "left") for n in (2, 6, 9, 12)]
    expected = [model(**b).logits for b in batches]
    wrong = []

    def serve(i):
        same = [torch.equal(model(**batches[i]).logits, expected[i]) for _ in range(25)]
        wrong.extend([i] * same.count(False))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_compiled_model_gives_what_the_plain_one_gives(build, perturb):
    model = build("llama")
    perturb(adapt(model, LoReFT(r=3, positions="f1+l1")), 0.3)
    batch = _batch(model, [ROW, [3, 4, 5, 6, 7, 8, 9]], "left")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, model(**batch).logits)


def test_a_decoder_learns_to_edit_what_it_will_be_given_as_the_prompt(build, perturb):
    """The last tokens before the first label are edited, as they will be when the prompt stands alone."""
    model = build("llama")
    adapter = adapt(model, LoReFT(r=3, positions="f1+l2"))
    perturb(adapter, 0.3)
    prompt = model(**_batch(model, [ROW])).logits[0]
    batch = _batch(model, [[*ROW, 20, 21], [3, 4, 30, 31, 32, 33, 34]])
    labels = torch.tensor([[*[-100] * 5, 20, 21], [-100, -100, 30, 31, 32, 33, 34]])
    given = model(**batch, labels=labels).logits
    torch.testing.assert_close(given[0, :5], prompt, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given[1, :2], model(**_batch(model, [[3, 4]])).logits[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(**batch).logits[0, :5], prompt, rtol=1e-2, atol=1e-2)
    # text without a prompt is taken whole
    whole = batch["input_ids"]
    assert torch.equal(model(**batch, labels=whole).logits, model(**batch).logits)


@torch.no_grad()
def test_labels_of_tokens_end_no_prompt_where_nothing_is_written(build, perturb):
    config = build("llama").config
    config.num_labels = 3
    tagger, reader = LlamaForTokenClassification(config).eval(), build("t5")
    labels = torch.tensor([[-100, -100, 1, 2, 0]])
    for model in (tagger, reader):
        perturb(adapt(model, LoReFT(r=3, positions="l1")), 0.3)
        batch = _batch(model, [ROW])
        with labels_of_batch.passing(labels):  # as long as the text by chance
            told = model(**batch).logits
        assert torch.equal(told, model(**batch).logits)


def test_the_ready_module_says_where_the_prompt_ends(llama_folder):
    module = PeftModule(
        str(llama_folder), LoReFT(r=3, positions="l1"), {"name": "sft", "all_logits": True, "packing": False}
    )
    module.configure_model()
    with torch.no_grad():
        for parameter in module.adapter.parameters():
            parameter.add_(0.1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, -100, 7, 8, 9]])}
    seen = []
    module.model.register_forward_hook(lambda m, args, out: seen.append(out.logits))
    module.eval()
    module.task.loss(module._outputs(batch), batch)
    torch.testing.assert_close(seen[0][:, :2], module.model(input_ids=ids[:, :2]).logits)
    assert not torch.allclose(seen[0], module.model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_only_the_chosen_layers_are_edited(build):
    model = build("t5")
    names = list(base_tensors(model))
    adapter = adapt(model, LoReFT(r=2, layers_to_transform=[1]))
    assert set(adapter.state_dict()) == {f"encoder.block.1.{n}" for n in ("rotation", "weight", "bias")}
    assert list(base_tensors(model)) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "f2-l1"}, "positions must be such as 'f3\\+l2', 'f3', 'l2' or 'all', but got 'f2-l1'"),
        ({"positions": "f0"}, "but got 'f0'"),
        ({"positions": ""}, "but got ''"),
        ({"positions": "f2l1"}, "but got 'f2l1'"),
        ({"r": 0}, "r must be 1 or more, but got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, but got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"r": 33}, "r=33 is above the hidden size 32"),
        ({"layers_to_transform": [2]}, "no module in layer \\[2\\]; the matched modules lie in layers 0 to 1"),
        ({"layer_modules": ["layr"]}, "layer_modules: 'layr' matches no module; did you mean 'layer'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, build):
    with pytest.raises(ValueError, match=message):
        adapt(build("bert"), LoReFT(**options))


def test_models_and_calls_that_do_not_tell_the_rows_ends_are_refused(build):
    with pytest.raises(ValueError, match="no stack of layers in ConvNet; name the layers in layer_modules"):
        adapt(build("convnet"), LoReFT(positions="all"))
    with pytest.raises(ValueError, match="found none in Encoder; choose another method"):
        adapt(build("encoder"), LoReFT(layer_modules=r"encoder\.layers\.\d"))
    model = build("llama")
    adapt(model, LoReFT(r=2))
    with pytest.raises(ValueError, match=r"attention_mask of \(batch, tokens\) = \(1, 5\), but got a \(1, 1, 5, 5\)"):
        model(input_ids=torch.tensor([ROW]), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(RuntimeError, match="a layer ran without the model's forward around it"):
        model.model.layers[0](torch.randn(1, 5, 32), position_embeddings=(torch.ones(1, 5, 8), torch.ones(1, 5, 8)))


def test_dropout_is_of_the_whole_edited_state_and_of_nothing_else(build):
    model = build("llama").train()
    adapter = adapt(model, LoReFT(r=2, positions="f1", layers_to_transform=[1], dropout=0.999999))
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    torch.manual_seed(0)
    model(**_batch(model, [ROW]))
    with adapter.disabled():
        model(**_batch(model, [ROW]))
    torch.testing.assert_close(seen[0][:, 0], torch.zeros(1, 32), rtol=0, atol=1e-6)
    assert torch.equal(seen[0][:, 1:], seen[1][:, 1:])


def test_positions_are_read_as_the_paper_writes_them():
    assert parse_positions("f3+l2") == (3, 2)
    assert parse_positions("f3") == (3, 0)
    assert parse_positions("l2") == (0, 2)
    assert parse_positions("all") is None


def test_the_layers_of_a_model_without_a_configuration_are_its_one_list_of_modules(build, call, perturb):
    model = build("encoder")
    base = call(model, "encoder")
    adapter = adapt(model, LoReFT(r=2, positions="all"))
    assert list(adapter.tree.layers_by_module) == ["encoder.layers.0", "encoder.layers.1"]
    perturb(adapter)
    assert not torch.equal(call(model, "encoder"), base)
