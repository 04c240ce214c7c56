"""Which entries are chosen, and that nothing but them is trained."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PeftCallback, SparseTuning, adapt, load_adapter
from lightning_peft.methods.sparse_tuning import SparseLayer


def _batches(count=4, rows=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (rows, 7), generator=generator) for _ in range(count)]


def _loss(model, name, ids):
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3)


def _in_float64(model, adapter):
    model.double()
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()


def _layers(adapter):
    return {n: x for n, x in adapter.tree.layers_by_module.items() if isinstance(x, SparseLayer)}


def _fisher(model, name, batches, places):
    """The mean over batches of the squared gradients, on weights that train as usual; the paper's section 3."""
    weights = [model.get_submodule(n).weight for n in places]
    total = [torch.zeros_like(w) for w in weights]
    for ids in batches:
        grads = torch.autograd.grad(_loss(model, name, ids), weights)
        for sum_, grad in zip(total, grads, strict=True):
            sum_ += grad**2 / len(batches)
    return {n: t.T if name == "gpt2" else t for n, t in zip(places, total, strict=True)}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_gradient_mask_is_where_the_empirical_fisher_information_is_largest(name, build):
    batches = _batches()
    base = build(name).double()
    model = build(name)
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient"))
    _in_float64(model, adapter)
    adapter.prepare([lambda ids=ids: _loss(model, name, ids) for ids in batches])
    layers = _layers(adapter)
    fisher = _fisher(base, name, batches, list(layers))
    for place, layer in layers.items():
        assert layer.count == 2 * sum(layer.shape)
        wanted = fisher[place].flatten().topk(layer.count).indices.sort().values
        row, column = layer.shira_indices.long()
        assert torch.equal(row * layer.shape[1] + column, wanted), place


def test_scores_are_sums_of_squared_gradients(build):
    batches = _batches()
    base = build("llama").double()
    model = build("llama")
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient", target_modules=["q_proj", "down_proj"]))
    _in_float64(model, adapter)
    layers = _layers(adapter)
    probes = [layer.begin_scoring() for layer in layers.values()]
    for ids in batches:
        for layer, grad in zip(layers.values(), torch.autograd.grad(_loss(model, "llama", ids), probes), strict=True):
            layer.add_score(grad)
    fisher = _fisher(base, "llama", batches, list(layers))
    for place, layer in layers.items():
        torch.testing.assert_close(layer.score / len(batches), fisher[place], rtol=1e-10, atol=1e-10)


def test_no_more_batches_are_drawn_than_asked_for(build):
    model = build("bert")
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient", mask_batches=2))
    drawn = []

    def losses():
        for ids in _batches():
            drawn.append(ids)
            yield lambda ids=ids: model(input_ids=ids).logits.pow(2).mean()

    adapter.prepare(losses())
    assert len(drawn) == 2
    assert all(layer.chosen and layer.probe is None and layer.score is None for layer in _layers(adapter).values())


def test_preparing_leaves_the_model_as_it_was_and_nothing_with_a_gradient(build, call):
    model = build("bert")
    base, before = call(model, "bert"), copy.deepcopy(model.state_dict())
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient"))
    adapter.prepare([lambda: call(model, "bert").pow(2).mean()])
    assert torch.equal(call(model, "bert"), base)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_training_before_any_data_was_seen_is_refused_and_evaluation_gives_the_base(build, call, tmp_path):
    model = build("bert")
    base = call(model, "bert")
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient"))
    assert torch.equal(call(model.eval(), "bert"), base)
    with pytest.raises(RuntimeError, match="data that it has not seen"):
        call(model.train(), "bert")
    with pytest.raises(RuntimeError, match="data that it has not seen"):
        adapter.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    adapter.merge()
    assert torch.equal(call(model.eval(), "bert"), base)


def test_a_loaded_gradient_mask_is_ready_to_train(build, call, perturb, tmp_path):
    model = build("bert")
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient"))
    adapter.prepare([lambda: call(model, "bert").pow(2).mean()])
    perturb(adapter)
    adapter.save(tmp_path / "a")
    fresh = build("bert")
    loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(call(fresh, "bert"), call(model, "bert"))
    call(fresh.train(), "bert").sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_loss_that_does_not_reach_the_modules_is_refused(build, call):
    model = build("bert")
    adapter = adapt(model, SparseTuning(r=2, mask_type="gradient"))
    for losses in ([], [lambda: torch.zeros(())], [lambda: torch.ones((), requires_grad=True) * 2]):
        with pytest.raises(ValueError, match="no loss depends on the modules"):
            adapter.prepare(losses)
    assert all(layer.probe is None for layer in _layers(adapter).values())


def test_the_magnitude_mask_is_where_the_weights_are_largest(build):
    for name in ("bert", "gpt2"):
        model = build(name)
        for place, layer in _layers(adapt(model, SparseTuning(r=2, mask_type="magnitude"))).items():
            weight = model.get_submodule(place).weight
            weight = (weight.T if name == "gpt2" else weight).abs()
            row, column = layer.shira_indices.long()
            inside = weight[row, column]
            assert len(inside) == 2 * sum(layer.shape)
            outside = weight.flatten().sort().values[: weight.numel() - len(inside)]
            assert inside.min() >= outside.max()


@pytest.mark.filterwarnings("ignore")  # what peft and transformers warn of each other
def test_the_random_mask_is_that_of_peft_for_the_same_seed(build):
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=3, random_seed=11, target_modules=["query", "dense"])
    theirs = peft.get_peft_model(build("bert"), config).base_model.model
    ours = adapt(build("bert"), SparseTuning(r=3, random_seed=11, target_modules=["query", "dense"]))
    for place, layer in _layers(ours).items():
        assert torch.equal(layer.shira_indices, theirs.get_submodule(place).shira_indices["default"])


def test_merging_changes_the_chosen_entries_and_no_other(build, perturb):
    model = build("gpt2")
    adapter = adapt(model, SparseTuning(r=2, random_seed=1))
    perturb(adapter)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in _layers(adapter)}
    adapter.merge()
    for place, layer in _layers(adapter).items():
        changed = (model.get_submodule(place).weight != before[place]).T.nonzero()
        assert torch.equal(changed.T.int(), layer.shira_indices)


@pytest.mark.filterwarnings("ignore")  # what peft and transformers warn of each other
def test_a_mask_function_of_ones_own_in_a_peft_folder_is_read_by_its_places(build, call, perturb, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=2, target_modules=["query"])
    config.mask_type = "first"
    config.mask_fn = lambda layer, r, **_: torch.arange(32 * 32).view(32, 32) < r * 64
    theirs = peft.get_peft_model(build("bert"), config).eval()
    for key, parameter in theirs.named_parameters():
        if "shira_weight" in key:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "a")
    model = build("bert")
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(call(model, "bert"), call(theirs, "bert"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r must be 1 or more"),
        ({"mask_type": "magnitud"}, "mask_type 'magnitud' is unknown; did you mean 'magnitude'"),
        ({"mask_batches": 0}, "mask_batches must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SparseTuning(**options)


def test_more_entries_than_a_module_has_are_refused(build):
    with pytest.raises(ValueError, match=r"r=17 asks for 1088 entries of .*query.*, which has 1024; r can be 16"):
        adapt(build("bert"), SparseTuning(r=17, target_modules=["query"]))


def test_a_weight_that_is_not_there_cannot_be_compared():
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match="offloaded or quantized"):
        adapt(model, SparseTuning(r=1, mask_type="magnitude", target_modules=["0"]))


def test_a_sparse_adapter_compiles_as_one_graph_with_its_backward(perturb):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    adapter = adapt(model, SparseTuning(r=1, target_modules=["0", "2"]))
    perturb(adapter)
    x = torch.randn(3, 8)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


class _Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def test_a_trainer_chooses_by_its_data_and_a_resumed_run_keeps_the_choice(trainer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=generator), torch.arange(16) % 4
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    method = SparseTuning(r=1, mask_type="gradient", target_modules=["0", "2"])
    plain = _Net()
    losses = [plain.training_step(batch, 0) for batch in batches]
    weights = {"0": plain.net[0].weight, "2": plain.net[2].weight}
    fisher = {n: sum(torch.autograd.grad(x, w, retain_graph=True)[0] ** 2 for x in losses) for n, w in weights.items()}

    module, callback = _Net(), PeftCallback(method, model="net")
    first = trainer(callback, max_epochs=1)
    first.fit(module, batches)
    first.save_checkpoint(tmp_path / "last.ckpt")
    chosen = {n: x.shira_indices.clone() for n, x in _layers(callback.adapter(module)).items()}
    for name, (row, column) in chosen.items():
        wanted = fisher[name].flatten().topk(len(row)).indices.sort().values
        assert torch.equal(row.long() * fisher[name].shape[1] + column, wanted)
    resumed, again = _Net(), PeftCallback(method, model="net")
    other = DataLoader(TensorDataset(x.flip(1), y), batch_size=4)  # by which other entries would be chosen
    trainer(again, max_epochs=2).fit(resumed, other, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, layer in _layers(again.adapter(resumed)).items():
        assert torch.equal(layer.shira_indices, chosen[name])
        before = callback.adapter(module).state_dict()[f"{name}.shira_weight"]
        assert not torch.equal(layer.shira_weight, before)
