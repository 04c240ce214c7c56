"""The bridge to Hugging Face PEFT: every kind of tuner of the installed version works or is refused for a reason."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import re
import threading

import pytest
import torch
from torch.nn import functional as F

from lightning_peft import Adapter, HFPeft, LoRA, activate, adapt, load_adapter
from lightning_peft.core.activation import set_trainable
from lightning_peft.methods.config import method_from_config, method_to_config
from lightning_peft.methods.hf_peft_tuners import place_tuner

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

MIXED_IN_PEFT = (
    "it mixes LoRA adapters that peft has trained before and reads their folders; train LoRA here, and mix in peft"
)
BETWEEN_STEPS = "it moves ranks between modules by calls between the optimizer's steps, which nothing here makes"
OWN_LOSS = "it computes a loss of its own inside the model, from which tokens are instruction, input and answer"
NO_NETWORK = (
    "peft's file keeps what its network gives and not the network, so a run could not go on from it; this package has "
    "a method of its own, PTuning"
)
SECOND_NETWORK = "it runs a second network beside the model by hooks on it, not layers around modules"

# The options of a tiny model for each kind, or the reason why it cannot run.
TABLE: dict[str, dict | str] = {
    "ADALORA": f"ADALORA cannot run here: {BETWEEN_STEPS}",
    "ADAMSS": {},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": f"CPT cannot run here: {OWN_LOSS}",
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {},
    "LILY": {"target_modules": ["q_proj", "v_proj"]},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "LORA": {"use_dora": True},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2, "task_type": "CAUSAL_LM"},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": f"P_TUNING cannot run here: {NO_NETWORK}",
    "POLY": {"n_tasks": 2, "task_type": "CAUSAL_LM"},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {},
    "ROAD": {"group_size": 8},
    "SHADOW": f"SHADOW cannot run here: {SECOND_NETWORK}",
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 50, 60]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
    "XLORA": f"XLORA cannot run here: {MIXED_IN_PEFT}",
}
# a bias beside a module that has none, weights mixed anew for each token, a mix of skills by task, prompts
PROMPTS = ("CARTRIDGE", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
CANNOT_BE_MERGED = ("BEFT", "LILY", "POLY", "ADAPTION_PROMPT", *PROMPTS)
WORKING = [kind for kind, case in TABLE.items() if isinstance(case, dict)]
REFUSED = [kind for kind, case in TABLE.items() if isinstance(case, str)]
IDS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(1))
TASKS = {
    "POLY": {"task_ids": torch.tensor([0, 1, 1])},
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1, 1])},
}


def _method(kind):
    return HFPeft(config={"peft_type": kind, **TABLE[kind]})


def _out(model, kind):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **TASKS.get(kind, {})).logits[:, -7:]


def _train(model, adapter, kind, steps=6):
    """The losses of some steps at the same random draws, and the trained parameters that got no gradient."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    losses, without = [], []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = F.cross_entropy(_out(model, kind)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        without = without or [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses, without


def test_the_table_knows_every_kind_that_the_installed_peft_has():
    assert sorted(TABLE) == sorted(kind.value for kind in peft.PeftType)


@pytest.mark.parametrize("kind", WORKING)
def test_a_fresh_adapter_gives_what_peft_gives_from_the_same_seed(kind, build):
    ours, theirs = build("llama"), build("llama")
    torch.manual_seed(3)
    adapter = adapt(ours, _method(kind))
    options = adapter.method.peft_config(ours, adapter.tree.record.layers)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs, peft.get_peft_config({"task_type": "CAUSAL_LM"} | options)).eval()
    torch.testing.assert_close(_out(ours, kind), _out(theirs, kind), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", WORKING)
def test_training_moves_the_adapter_alone_and_disabling_and_removing_give_the_base_to_the_bit(kind, build):
    model = build("llama")
    base, state = _out(model, "base"), {n: t.clone() for n, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    adapter = adapt(model, _method(kind))
    start = [p.detach().clone() for p in adapter.parameters()]
    losses, without = _train(model, adapter, kind)
    assert losses[-1] < losses[0]
    assert not without
    assert all(not torch.equal(p, q) for p, q in zip(adapter.parameters(), start, strict=True))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if n in state)
    trained = _out(model, kind)
    assert not torch.equal(trained, base)
    with adapter.disabled():
        assert torch.equal(_out(model, "base"), base)
    assert torch.equal(_out(model, kind), trained)
    adapter.remove()
    assert torch.equal(_out(model, "base"), base)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("kind", WORKING)
def test_a_saved_folder_loads_in_peft_and_here_and_peft_s_own_folder_too(kind, build, tmp_path):
    model = build("llama")
    adapter = adapt(model, _method(kind))
    _train(model, adapter, kind, steps=3)
    expected = _out(model, kind)
    adapter.save(tmp_path / "ours")
    torch.manual_seed(99)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(_out(theirs, kind), expected, rtol=1e-5, atol=1e-5)
    again = build("llama")
    loaded = load_adapter(again, tmp_path / "ours")
    assert torch.equal(_out(again, kind), expected)
    assert loaded.method == adapter.method
    theirs.save_pretrained(tmp_path / "theirs")
    foreign = build("llama")
    load_adapter(foreign, tmp_path / "theirs")
    torch.testing.assert_close(_out(foreign, kind), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", WORKING)
def test_copies_stand_alone_a_16_bit_base_runs_and_merging_keeps_the_output(kind, build, perturb):
    model = build("llama")
    adapter = adapt(model, _method(kind))
    perturb(adapter)
    expected = _out(model, kind)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    perturb(Adapter(twin))
    assert torch.equal(_out(model, kind), expected)
    assert not torch.equal(_out(twin, kind), expected)
    if kind in CANNOT_BE_MERGED:
        with pytest.raises(ValueError, match="cannot be merged"):
            adapter.merge()
    else:
        adapter.merge()
        torch.testing.assert_close(_out(model, kind), expected, rtol=1e-4, atol=1e-5)
        adapter.unmerge()
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    output = _out(model, kind)
    assert output.dtype == torch.bfloat16
    # eight bits of mantissa, through two layers
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", WORKING)
def test_a_kind_says_whether_it_is_a_change_of_weights(kind, build):
    assert _method(kind).mergeable == (kind == "BEFT" or kind not in CANNOT_BE_MERGED)
    if kind == "BEFT":  # on modules that have biases
        model = build("bert")
        adapter = adapt(model, HFPeft(config={"peft_type": kind, "target_modules": ["query"]}))
        adapter.merge()
        assert adapter.plan.merge_bytes > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_run_is_refused_by_name_with_the_reason(kind):
    with pytest.raises(ValueError, match=re.escape(f"HFPeft({kind}): {TABLE[kind]}")):
        HFPeft(config={"peft_type": kind})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "HRR"}, "peft_type='HRR' is none of the installed peft's; did you mean 'HRA'"),
        ({"r": 8}, "peft_type=None is none of the installed peft's"),
        ({"peft_type": "HRA", "rr": 8}, "HRA has no option 'rr'; did you mean 'r'"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "changes the base's weights; this package has a method"),
        ({"peft_type": "HRA", "bias": "all"}, "bias='all' trains biases of the base"),
        ({"peft_type": "LORA", "trainable_token_indices": [1]}, "put an adapter of the kind TRAINABLE_TOKENS beside"),
        ({"peft_type": "ADAMSS", "use_asa": True}, "calls between the optimizer's steps"),
        ({"peft_type": "PREFIX_TUNING", "prefix_projection": True}, "a run could not go on from it"),
        ({"peft_type": "PROMPT_TUNING", "num_transformer_submodules": 2}, "only 1 is supported"),
        ({"peft_type": "VBLORA", "save_only_topk_weights": True}, "could not be resumed"),
    ],
)
def test_wrong_options_are_refused_by_name(config, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        HFPeft(config=config)


def test_what_is_no_configuration_and_a_rate_of_zero_are_refused():
    with pytest.raises(TypeError, match=r"takes a peft\.PeftConfig or a dictionary"):
        HFPeft(config="HRA")
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        HFPeft(config={"peft_type": "HRA"}, learning_rate=0)


def test_a_pattern_that_matches_nothing_and_an_option_that_does_not_fit_name_themselves(build):
    with pytest.raises(ValueError, match="'q_prj' matches no module; did you mean"):
        adapt(build("llama"), HFPeft({"peft_type": "HRA", "target_modules": ["q_prj"]}))
    with pytest.raises(ValueError, match=r"HFPeft\(FOURIERFT\): peft says: .n_frequency. should be less"):
        adapt(build("llama"), HFPeft({"peft_type": "FOURIERFT", "n_frequency": 5000}))
    with pytest.raises(ValueError, match=r"HFPeft\(HRA\): peft says: .* Conv1D"):
        adapt(build("gpt2"), HFPeft({"peft_type": "HRA"}))


@pytest.mark.parametrize("kind", WORKING)
def test_a_configuration_is_plain_and_comes_back_from_json_and_from_peft_s_object(kind):
    method = _method(kind)
    again = method_from_config(json.loads(json.dumps(method_to_config(method))))
    assert again == method
    assert HFPeft(peft.get_peft_config({"peft_type": kind, **TABLE[kind]})) == method


def test_a_configuration_object_brings_its_modules_to_save_along(build):
    config = peft.HRAConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    model = build("bert")
    adapter = adapt(model, HFPeft(config))
    assert adapter.method.modules_to_save == ["classifier"]
    assert adapter.tree.record.copies == ["classifier"]
    assert "classifier.weight" in adapter.state_dict()


def test_without_peft_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape("pip install 'lightning-peft[hf]'")):
        HFPeft({"peft_type": "HRA"})


def test_a_tuner_that_never_calls_its_module_does_not_pass_over_another_adapter(build, perturb):
    model = build("llama")
    perturb(adapt(model, LoRA(r=2), "first"))
    perturb(adapt(model, HFPeft({"peft_type": "HRA"}), "second"))
    model.adapters.switch.active = ("first", "second")
    with pytest.raises(RuntimeError, match="the other active adapter there would be passed over"):
        _out(model, "HRA")


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_row_with_padding_behind_it_gives_what_it_gives_alone(kind, build, perturb):
    model = build("llama")
    perturb(adapt(model, _method(kind)))
    alone = model(input_ids=IDS[:1, :5], **{k: t[:1] for k, t in TASKS.get(kind, {}).items()}).logits[:, -5:]
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, 5:] = 0
    tasks = {k: t[:1] for k, t in TASKS.get(kind, {}).items()}
    padded = model(input_ids=IDS[:1], attention_mask=mask, **tasks).logits[:, -7:-2]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_generation_with_a_prompt_is_greedy_search_without_a_cache(kind, build, perturb):
    model = build("llama")
    perturb(adapt(model, _method(kind)), 0.5)
    ids = IDS[:2]
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    said = model.generate(IDS[:2], attention_mask=torch.ones_like(IDS[:2]), max_new_tokens=6, do_sample=False)
    assert torch.equal(said, ids[:, : said.shape[1]])


def test_prompts_for_a_cache_or_by_task_say_what_they_need(build):
    from transformers import DynamicCache, EncoderDecoderCache

    with pytest.raises(ValueError, match=r"HFPeft\(PREFIX_TUNING\) fills the cache of a decoder, but T5"):
        adapt(build("t5"), _method("PREFIX_TUNING"))
    model = build("llama")
    adapt(model, _method("MULTITASK_PROMPT_TUNING"))
    with pytest.raises(ValueError, match="pass task_ids, the number of each example's task"):
        model(input_ids=IDS)
    model = build("llama").train()
    adapt(model, _method("PREFIX_TUNING"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        model(input_ids=IDS)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="fills a DynamicCache, but got an EncoderDecoderCache"):
        model.eval()(input_ids=IDS, past_key_values=cache)


def test_a_tuner_that_does_more_than_wrapping_modules_is_refused(build, monkeypatch):
    def place(config, model="llama"):
        return place_tuner(build(model), config, is_saved=lambda name: False)

    with pytest.raises(ValueError, match="starts by exchanging the base's weights"):
        place(peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"also exchanges parts of 'encoder\.layers\.0\.self_attn'"):
        place(peft.LoraConfig(target_modules=["self_attn"]), "encoder")
    with pytest.raises(ValueError, match=r"peft saves .* in another form than its layers hold it"):
        place(peft.VBLoRAConfig(**TABLE["VBLORA"], save_only_topk_weights=True, target_modules=["q_proj"]))

    def changes(act):
        class Tuner(peft.LoraModel):
            def _post_injection_hook(self, model, config, name):
                act(model)

        monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, Tuner)
        place(peft.LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(ValueError, match="has changed the base's weights; load the base anew"):
        changes(lambda model: model.model.norm.weight.data.add_(1))
    with pytest.raises(ValueError, match="the tuner hooks the model's forward"):
        changes(lambda model: model.register_forward_hook(print))
    with pytest.raises(ValueError, match=r"exchanges 'model\.norm' instead of putting a layer around it"):
        changes(lambda model: setattr(model.model, "norm", torch.nn.Identity()))


def test_a_folder_of_a_kind_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "XYZ"}')
    with pytest.raises(ValueError, match=r"'XYZ' are not supported; expected one of .*, or a kind of the package peft"):
        load_adapter(torch.nn.Linear(2, 2), tmp_path)


def test_a_copy_turns_its_gradients_like_the_original(build, perturb):
    """OSF keeps the gradients orthogonal to the base's main directions by hooks on its parameters."""
    model = build("llama")
    perturb(adapt(model, HFPeft({"peft_type": "OSF"})))
    gradients = []
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        twin.zero_grad()
        _out(twin, "OSF").pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in Adapter(twin).parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_threads_that_share_a_model_do_not_disturb_each_other(build, perturb):
    model = build("llama")
    perturb(adapt(model, HFPeft({"peft_type": "ROAD", "group_size": 8})))
    with torch.no_grad():
        expected, wrong = _out(model, "ROAD"), []

        def serve():
            with torch.no_grad():
                wrong.extend(1 for _ in range(10) if not torch.equal(_out(model, "ROAD"), expected))

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_gradient_checkpointing_gives_the_same_gradients(build, perturb):
    gradients = []
    for checkpointed in (False, True):
        model = build("llama").train()
        adapter = adapt(model, HFPeft({"peft_type": "HRA"}))
        perturb(adapter)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _out(model, "HRA").pow(2).mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_prefix_of_peft_writes_behind_padding_and_without_a_cache_what_it_writes_for_the_row_alone(
    name, build, perturb, tmp_path
):
    model = build(name)
    adapter = adapt(model, HFPeft({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}))
    perturb(adapter)
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a").eval()
    ids = torch.tensor([[5, 60, 7, 41, 9]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)

    def scores(given, read, **options):
        mask = (read != 0).long()
        wanted = {"output_scores": True, "return_dict_in_generate": True}
        out = given.generate(
            input_ids=read,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            **wanted,
            **options,
        )
        return torch.stack(out.scores)

    expected = scores(theirs, ids)
    for read in (ids, padded):
        torch.testing.assert_close(scores(model, read), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores(model, read, use_cache=False), expected, rtol=1e-5, atol=1e-5)
    logits = model(input_ids=padded, attention_mask=(padded != 0).long()).logits[:, 3:]
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_dora_of_peft_over_another_adapter_reads_the_weights_that_this_one_makes(build, call, perturb, name):
    model = build(name)
    perturb(adapt(model, LoRA(r=2), "below"), 0.2)
    above = HFPeft({"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": "all-linear"})
    perturb(adapt(model, above, "above"), 0.1)
    activate(model, "below", "above")
    apart = call(model, name)
    Adapter(model, "below").merge()
    torch.testing.assert_close(call(model, name), apart, rtol=1e-5, atol=1e-5)
    Adapter(model, "above").merge()
    torch.testing.assert_close(call(model, name), apart, rtol=1e-5, atol=1e-5)


def test_dora_of_peft_over_another_adapter_trains_both(build, call):
    model = build("llama")
    adapt(model, LoRA(r=2), "below")
    adapt(model, HFPeft({"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["q_proj"]}), "above")
    activate(model, "below", "above")
    set_trainable(model, "below", True)
    for name in ("below", "above"):
        for parameter in Adapter(model, name).parameters():
            parameter.data.normal_(std=0.1)
    call(model, "llama").pow(2).sum().backward()
    for name in ("below", "above"):
        assert all(p.grad is not None and p.grad.any() for p in Adapter(model, name).parameters())
