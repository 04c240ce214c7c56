"""Every method that Hugging Face PEFT knows, on every kind of model: the same numbers, and each reads the other's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_peft import adapt, load_adapter
from lightning_peft.core.method import PeftRepacked
from tests.parity.grid import MODELS, PAIRS, PEERS, REFUSED_BY_PEFT, REFUSED_HERE, TARGETS

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
BY_NAME = {p.name: p for p in PEERS}
FROM_THE_BASE = ("pissa", "olora")


def _cases(pairs):
    return pytest.mark.parametrize(("peer", "name"), [pytest.param(p, m, id=f"{p.name}-{m}") for p, m in pairs])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Lets the softmax of peft's LLaMA-Adapter keep float64; it rounds to float32 whatever comes in."""
    layer = pytest.importorskip("peft.tuners.adaption_prompt.layer")
    monkeypatch.setattr(layer, "F", SimpleNamespace(softmax=lambda scores, dim, dtype: F.softmax(scores, dim)))


@pytest.fixture
def run(call):
    """Runs a model and gives what it says of the text; peft gives what it says of the prompt too."""
    return lambda model, name: call(model, name)[:, -7:]


def _ours(peer, name, build, call, perturb):
    """Our adapted model, moved away from its start."""
    model = build(name)
    adapter = adapt(model, peer.make(name))
    if adapter.needs_data:
        adapter.prepare([lambda: call(model, name, 4).pow(2).mean()])
    perturb(adapter)
    return model, adapter


def _config(peer, name):
    """PEFT's configuration as its own user would write it."""
    # a conversion of what started from the base leaves the head out of the file
    head = None if peer.name in FROM_THE_BASE else "SEQ_CLS"
    kinds = {"bert": head, "t5": "SEQ_2_SEQ_LM", "vit": None}
    options = dict(peer.options)
    if peer.targets:
        # its "all-linear" would take a mixture's stacks of experts too, and a classifier that trains no head beside it
        options["target_modules"] = (
            "all-linear" if peer.targets == "all-linear" and name not in ("vit", "moe") else TARGETS[name]
        )
    if peer.kind == "IA3" and name == "vit":  # which peft knows no names for
        options |= {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peer.kind](task_type=kinds.get(name, "CAUSAL_LM"), **options)


def _double(model, adapter):
    model.double()
    for tensor in [*adapter.parameters(), *adapter.tree.buffers()]:
        tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data


def _from_file(peer, name, model, adapter, build, folder):
    """PEFT's model out of our file, and what it calls our tensors."""
    adapter.save(folder)
    theirs = peft.PeftModel.from_pretrained(build(name), folder, is_trainable=not peer.is_prompt).double().eval()
    if peer.is_prompt:
        theirs.prompt_encoder.requires_grad_(True)
        for key, parameter in theirs.base_model.named_parameters():
            parameter.requires_grad_("modules_to_save" in key)
    if getattr(adapter.method, "lora_fa", False):  # which is an optimizer in peft
        for key, parameter in theirs.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in key)
    trained = peft.get_peft_model_state_dict(theirs)
    state = adapter.state_dict()
    kept = adapter.method.to_peft(state) if isinstance(adapter.method, PeftRepacked) else state
    return theirs, {key: trained[adapter.method.peft_name(key, model)] for key in kept}


def _with_network(peer, name, model, adapter, build, folder):
    """PEFT's model with the network of our prompt, which no file holds."""
    theirs = peft.get_peft_model(build(name), _config(peer, name)).double().eval()
    twins = list(theirs.prompt_encoder["default"].parameters())
    state = adapter.state_dict()
    heads = {
        k: theirs.get_parameter(f"base_model.{k.replace('.', '.modules_to_save.default.')}")
        for k in state
        if k.startswith("classifier")
    }
    own = [k for k in state if k not in heads]
    # peft makes parts that this kind of network does not have
    pairs = heads | dict(zip(own, [t for t in twins if t.requires_grad], strict=True))
    with torch.no_grad():
        for key, twin in pairs.items():
            twin.copy_(state[key])
    return theirs, {key: twin.data for key, twin in pairs.items()}


def _apart(peer, name, model, adapter, build, folder):
    """PEFT's LoRA with our factors, on a base from which the start is taken, as PEFT does with a start of its own."""
    places = sorted(adapter.tree.layers_by_module)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=places)
    theirs = peft.get_peft_model(build(name), config).double().eval()
    state, pairs = adapter.state_dict(), {}
    for place in places:
        layer = theirs.get_submodule(f"base_model.model.{place}")
        a, b = (state[f"{place}.lora_{f}"].detach().double() for f in "AB")
        start = 1.5 * state[f"{place}.lora_B0"].double() @ state[f"{place}.lora_A0"].double()
        layer.base_layer.weight.data -= start.T if layer.fan_in_fan_out else start
        for factor, value in (("A", a), ("B", b)):
            weight = getattr(layer, f"lora_{factor}")["default"].weight
            weight.data.copy_(value)
            pairs[f"{place}.lora_{factor}"] = weight.data
    return theirs, pairs


@_cases(PAIRS)
def test_the_output_and_ten_steps_are_those_of_peft(peer, name, build, call, run, perturb, tmp_path):
    ours, adapter = _ours(peer, name, build, call, perturb)
    apart = getattr(adapter.method, "starts_apart", False)
    make = _with_network if peer.has_network else _apart if apart else _from_file
    theirs, pairs = make(peer, name, ours, adapter, build, tmp_path / "a")
    _double(ours, adapter)
    losses, first = [], []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        seen = []
        for step in range(10):
            output = run(model.eval(), name)
            loss = output.pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
            first.extend([output.detach()] if step == 0 else [])
        losses.append(torch.stack(seen))
    torch.testing.assert_close(first[0], first[1], rtol=1e-10, atol=1e-10)
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    state = adapter.state_dict()
    if isinstance(adapter.method, PeftRepacked) and make is _from_file:
        state = adapter.method.to_peft(state)
    for key, twin in pairs.items():
        torch.testing.assert_close(state[key], twin, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@_cases(PAIRS)
def test_peft_gives_the_output_of_our_folder(peer, name, build, call, run, perturb, tmp_path):
    ours, adapter = _ours(peer, name, build, call, perturb)
    expected = run(ours, name)
    _assert_near(expected, run(_read_by_peft(adapter, build, name, tmp_path / "a"), name))
    with adapter.disabled():
        assert not torch.allclose(run(ours, name), expected, rtol=1e-5, atol=1e-5)
    load_adapter(again := build(name), tmp_path / "a")
    _assert_near(run(again, name), expected)


def _read_by_peft(adapter, build, name, folder):
    adapter.save(folder)
    return peft.PeftModel.from_pretrained(build(name), folder).eval()


def _assert_near(given, expected):
    """To 1e-6 of the largest number, which is float32's own precision after some layers."""
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max().clamp_min(1)))


# peft's own OLoRA has no form for Conv1D, which a test below says
MADE = [(p, m) for p, m in PAIRS if (p.name, m) != ("olora", "gpt2")]


def _look_at_data(theirs, name):
    rows = torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(4))
    batch = {"input_ids": rows} | ({"decoder_input_ids": rows} if name == "t5" else {})
    more = {}
    if name == "vit":  # has no padding, whose places peft looks up in input_ids
        batch = {"pixel_values": torch.randn(4, 3, 12, 12)}
        more = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda x, *_: x[0].flatten(0, 1)}
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False, **more)


@torch.no_grad()
@_cases(MADE)
def test_an_adapter_that_peft_makes_comes_here_and_goes_back(peer, name, build, call, run, tmp_path):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(build(name), _config(peer, name)).eval()
    if peer.name == "eva":
        _look_at_data(theirs, name)
    more = {}
    if peer.name in FROM_THE_BASE:  # which change the base, so that the folder needs its start to stand alone
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = peer.name
        more = {"path_initial_model_for_weight_conversion": tmp_path / "start"}
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    before = run(theirs, name)
    theirs.save_pretrained(tmp_path / "theirs", **more)
    model = build(name)
    adapter = load_adapter(model, tmp_path / "theirs")
    _assert_near(run(model, name), before)
    _assert_near(run(_read_by_peft(adapter, build, name, tmp_path / "back"), name), before)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", FROM_THE_BASE)
def test_a_start_from_the_weight_is_that_of_peft(start, name, build):
    model = build(name)
    adapter = adapt(model, BY_NAME[start].make(name))
    state = adapter.state_dict()
    places = [n for n in adapter.tree.layers_by_module if (start, name) != ("olora", "gpt2")]
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, target_modules=places or ["c_attn"])
    theirs = peft.get_peft_model(build(name), config)
    if not places:  # its factors are those of the transposed weight, so that it cannot run
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            theirs(input_ids=torch.tensor([[5, 6]]))
        return
    for place in places:
        layer = theirs.get_submodule(f"base_model.model.{place}")
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(state[f"{place}.lora_B"] @ state[f"{place}.lora_A"], product, rtol=1e-4, atol=1e-6)


def test_every_method_is_on_every_model_or_refused_with_a_reason():
    absent = {(p.name, m) for p in PEERS for m in MODELS} - {(p.name, m) for p, m in PAIRS}
    assert absent == {*REFUSED_HERE, *REFUSED_BY_PEFT}


@pytest.mark.parametrize(("name", "model"), REFUSED_HERE)
def test_what_has_no_meaning_is_refused(name, model, build):
    with pytest.raises(ValueError, match=REFUSED_HERE[name, model]):
        adapt(build(model), BY_NAME[name].make(model))


@pytest.mark.parametrize(("name", "model"), REFUSED_BY_PEFT)
def test_what_works_here_alone_is_refused_by_peft(name, model, build, call, perturb, tmp_path):
    peer = BY_NAME[name]
    _, adapter = _ours(peer, model, build, call, perturb)
    with pytest.raises((TypeError, ValueError), match=REFUSED_BY_PEFT[name, model]):
        _read_by_peft(adapter, build, model, tmp_path / "a")
    with pytest.raises((TypeError, ValueError), match=REFUSED_BY_PEFT[name, model]):
        peft.get_peft_model(build(model), _config(peer, model))
