"""A base whose weights a quantizer keeps in a few bits: every method trains on it, and merging says what it loses."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import (
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    int8_vectorwise_quant,
    quantize_4bit,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

from lightning_peft import (
    IA3,
    OFT,
    Adapter,
    BottleneckAdapter,
    LoRA,
    MiSS,
    PrefixTuning,
    PromptTuning,
    Selective,
    SparseTuning,
    activate,
    adapt,
    load_adapter,
)
from lightning_peft.core.quantized import dequantized, full_weight, is_quantized, memory, number_of, requantized
from lightning_peft.tasks.quantization import note_full_weights
from tests.conftest import save_llama

pytestmark = [
    pytest.mark.usefixtures("codes_in_order"),
    pytest.mark.filterwarnings("ignore:.*merged weights are quantized again"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# torchao's 4-bit kernels need a GPU; this one keeps the same codes in bytes
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
QUANTIZERS = ["nf4", "int8", "int8_weight_only", "int4_weight_only"]
METHODS = {
    "lora": LoRA(r=4),
    "dropout": LoRA(r=4, lora_dropout=0.1),
    "dora": LoRA(r=4, use_dora=True),
    "pissa": LoRA(r=4, init_lora_weights="pissa"),
    "ia3": IA3(),
    "oft": OFT(oft_block_size=8),
    "bat": MiSS(r=4, init_weights="bat"),
    "sparse": SparseTuning(r=2, mask_type="magnitude"),
    "bottleneck": BottleneckAdapter(),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "prefix": PrefixTuning(num_virtual_tokens=3),
}
WEIGHTS = ["lora", "dora", "pissa", "ia3", "oft", "bat", "sparse"]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory, tokenizer_folder):
    """A tiny Llama whose rows are whole blocks of codes: bitsandbytes' AVX-512 kernel reads other rows wrongly."""
    return save_llama(tmp_path_factory.mktemp("llama"), tokenizer_folder, hidden_size=64, intermediate_size=128)


@pytest.fixture
def quantized(llama_folder):
    """The tiny Llama, loaded by transformers in one of the quantizers' ways."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

    def load(name):
        config = {
            "nf4": lambda: BitsAndBytesConfig(**NF4),
            "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
            "int8_weight_only": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
            "int4_weight_only": lambda: TorchAoConfig(INT4),
        }[name]()
        return LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=config, dtype=torch.float32).eval()

    return load


def _ids():
    return torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model):
    return model(_ids()).logits


def _train(model, adapter, steps=3):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(_ids(), labels=_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_method_trains_on_a_quantized_base_and_gives_it_back(quantized, quantizer, name):
    model = quantized(quantizer)
    before = _logits(model)
    adapter = adapt(model, METHODS[name])
    if name not in ("prompt", "prefix"):  # virtual tokens act from the start
        assert torch.equal(_logits(model), before)
    losses = _train(model, adapter)
    assert losses[-1] < losses[0]
    assert not torch.equal(_logits(model), before)
    adapter.remove()
    assert torch.equal(_logits(model), before)


def _quantized_afresh(quantizer, weight):
    """The numbers that the quantizer's own package makes of a weight."""
    if quantizer == "nf4":
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        return dequantize_4bit(codes, state)
    if quantizer == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return codes.float() * (scales / 127).unsqueeze(1)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    quantize_(layer, INT4 if quantizer == "int4_weight_only" else Int8WeightOnlyConfig())
    return layer.weight.dequantize().detach()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_merging_into_codes_is_the_sum_quantized_again_and_can_be_undone_to_the_bit(quantized, quantizer, name):
    model = quantized(quantizer)
    adapter = adapt(model, METHODS[name])
    _train(model, adapter)
    trained = _logits(model)
    place = next(n for n in adapter.tree.layers_by_module if n)
    module = model.get_submodule(place)
    weight = module.weight
    start = dequantized(module, weight)
    plain = nn.Linear(module.in_features, module.out_features, bias=False)
    plain.weight = nn.Parameter(start.clone())
    wanted = start + adapter.tree.layers_by_module[place].deltas(plain)["weight"].detach()
    adapter.merge()
    assert type(module.weight) is type(weight)
    # half a step of the quantizer: NF4's widest is 0.28 of the largest value in a block, double quantization apart
    step = {"nf4": 0.16, "int4_weight_only": 1 / 14}.get(quantizer, 1 / 200)
    assert (dequantized(module, module.weight) - wanted).abs().max() < step * wanted.abs().max()
    assert torch.equal(dequantized(module, module.weight), _quantized_afresh(quantizer, wanted))
    assert not torch.equal(_logits(model), trained)
    with adapter.disabled():
        assert module.weight is weight
    adapter.unmerge()
    assert module.weight is weight
    assert torch.equal(_logits(model), trained)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_warning_gives_the_share_that_rounding_takes(quantized, quantizer):
    model = quantized(quantizer)
    adapter = adapt(model, LoRA(r=4, target_modules=["q_proj"]))
    _train(model, adapter)
    modules = {n: model.get_submodule(n) for n in adapter.tree.layers_by_module if n}
    start = {n: dequantized(m, m.weight).double() for n, m in modules.items()}
    layers = {n: adapter.tree.layers_by_module[n] for n in modules}
    change = {n: (x.lora_B @ x.lora_A).detach().double() * x.scale for n, x in layers.items()}
    with pytest.warns(UserWarning, match="2 merged weights are quantized again") as caught:
        adapter.merge(keep_originals=False)
    said = str(next(w.message for w in caught if "quantized again" in str(w.message)))
    off = {n: dequantized(m, m.weight).double() - start[n] - change[n] for n, m in modules.items()}
    norm = {
        k: torch.cat([v.flatten() for v in part.values()]).norm()
        for k, part in {"off": off, "change": change, "size": {n: start[n] + change[n] for n in start}}.items()
    }
    shares = [float(s) / 100 for s in re.findall(r"([\d.]+)%", said)]
    worst = max(modules, key=lambda n: off[n].norm() / change[n].norm())
    expected = [norm["off"] / norm["size"], norm["off"] / norm["change"], off[worst].norm() / change[worst].norm()]
    # printed with two places, from float32 sums
    torch.testing.assert_close(torch.tensor(shares), torch.stack(expected).float(), atol=1.1e-4, rtol=1e-3)
    assert f"'{worst}.weight'" in said


def test_a_base_that_is_not_quantized_merges_without_a_word(build):
    model = build("llama")
    adapter = adapt(model, LoRA(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.merge()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
def test_lora_on_codes_is_pefts(quantized, quantizer):
    ours, theirs = quantized(quantizer), quantized(quantizer)
    adapter = adapt(ours, LoRA(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    wrapped = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    state = adapter.tree.state_dict()
    for key, tensor in sorted(state.items()):
        tensor.normal_(std=0.1, generator=generator)
        place, _, leaf = key.rpartition(".")
        wrapped.get_parameter(f"base_model.model.{place}.{leaf}.default.weight").data.copy_(tensor)
    wrapped.eval()
    torch.testing.assert_close(_logits(ours), _logits(wrapped), atol=1e-5, rtol=1e-5)
    adapter.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.merge_adapter()
    for place in adapter.tree.layers_by_module:
        if place:
            mine, other = ours.get_submodule(place), wrapped.get_submodule(f"base_model.model.{place}.base_layer")
            found, expected = dequantized(mine, mine.weight), dequantized(other, other.weight)
            # PEFT sums in the compute dtype: where the sums differ in the last bit, a code may be the next one
            assert ((found - expected).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_codes_of_a_weight_stand_for_its_numbers(quantized, llama_folder, quantizer):
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(llama_folder)
    model = quantized(quantizer)
    name = "model.layers.0.mlp.down_proj"
    module, expected = model.get_submodule(name), plain.get_submodule(name).weight.detach()
    assert is_quantized(module.weight)
    assert not is_quantized(model.lm_head.weight)
    for _ in range(2):  # a forward moves some quantizers' scales from the weight to the module
        numbers = dequantized(module, module.weight)
        assert numbers.dtype == torch.float32
        step = {"nf4": 0.16, "int4_weight_only": 1 / 14}.get(quantizer, 1 / 200)
        assert (numbers - expected).abs().max() < step * expected.abs().max()
        _logits(model)
    assert number_of(module.weight) == expected.numel()
    assert memory(module.weight) == expected.numel() // (2 if quantizer == "nf4" else 1)


def test_the_plan_counts_numbers_not_bytes(quantized, build):
    for quantizer in QUANTIZERS:
        model = quantized(quantizer)
        plan = adapt(model, LoRA(r=2)).plan
        names = [n for n, p in model.named_parameters() if is_quantized(p)]
        assert plan.total == sum(number_of(p) for n, p in model.named_parameters() if "adapters" not in n)
        assert plan.merge_bytes == sum(memory(model.get_parameter(n)) for n in names)


@pytest.mark.parametrize(
    "method", [Selective(last_layers=1), LoRA(r=2, modules_to_save=["o_proj"])], ids=["in place", "a copy"]
)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_cannot_train_themselves(quantized, quantizer, method):
    model = quantized(quantizer)
    with pytest.raises(ValueError, match=r"proj.weight' is quantized \(\w+\) and cannot train itself"):
        adapt(model, method)
    assert not hasattr(model, "adapters")


def test_biases_and_norms_beside_codes_train_in_place(quantized):
    model = quantized("nf4")
    adapter = adapt(model, Selective(parameter_types=["norm"]))
    losses = _train(model, adapter)
    assert losses[-1] < losses[0]


def test_an_adapter_trained_on_codes_fits_the_base_as_it_was_and_in_other_codes(quantized, llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = quantized("nf4")
    adapter = adapt(model, LoRA(r=2))
    _train(model, adapter)
    adapter.save(tmp_path / "from codes")
    plain = LlamaForCausalLM.from_pretrained(llama_folder)
    for base in (plain, quantized("int8"), quantized("nf4")):
        loaded = load_adapter(base, tmp_path / "from codes")
        for key, value in adapter.tree.state_dict().items():
            assert torch.equal(loaded.tree.state_dict()[key], value)
    assert torch.equal(_logits(base), _logits(model))
    Adapter(plain).save(tmp_path / "from numbers")
    load_adapter(quantized("nf4"), tmp_path / "from numbers")


def test_an_adapter_trained_on_codes_is_refused_by_a_base_with_other_embeddings(quantized, llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = quantized("nf4")
    adapt(model, LoRA(r=2)).save(tmp_path / "a")
    other = LlamaForCausalLM.from_pretrained(llama_folder)
    other.get_input_embeddings().weight.data += 1
    with pytest.raises(ValueError, match="on another base"):
        load_adapter(other, tmp_path / "a")


@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
def test_a_merged_model_keeps_its_codes_in_a_folder(quantized, quantizer, tmp_path):
    from transformers import LlamaForCausalLM

    model = quantized(quantizer)
    adapter = adapt(model, LoRA(r=2))
    _train(model, adapter)
    trained = _logits(model)
    adapter.save_merged(tmp_path / "merged")
    assert torch.equal(_logits(model), trained)
    adapter.merge()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert is_quantized(again.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(_logits(again), _logits(model), atol=1e-6, rtol=1e-6)


def test_embeddings_are_compared_where_weights_cannot_be(quantized, llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    adapt(LlamaForCausalLM.from_pretrained(llama_folder), LoRA(r=2)).save(tmp_path / "a")
    other = quantized("nf4")
    other.get_input_embeddings().weight.data += 1
    with pytest.raises(ValueError, match="on another base"):
        load_adapter(other, tmp_path / "a")


@pytest.mark.parametrize("quantizer", ["int8_weight_only", "int4_weight_only"])
def test_codes_that_waited_while_the_model_was_cast_are_cast_when_they_return(quantized, quantizer):
    model, expected = quantized(quantizer), quantized(quantizer).to(torch.bfloat16)
    adapter = adapt(model, LoRA(r=2))
    adapter.merge()
    model.to(torch.bfloat16)
    adapter.unmerge()
    adapter.remove()
    assert model.model.layers[0].mlp.down_proj.weight.dtype == expected.model.layers[0].mlp.down_proj.weight.dtype
    assert torch.equal(_logits(model), _logits(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_adapters_merge_into_codes_on_a_gpu_and_come_out_again(quantized, quantizer):
    model = quantized(quantizer).cuda()
    ids = _ids().cuda()

    def logits():
        with torch.no_grad():
            return model(ids).logits

    before = logits()
    for name in ("first", "second"):
        adapter = adapt(model, LoRA(r=2, init_lora_weights="gaussian"), name)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.05)
    first, second = Adapter(model, "first"), adapter
    activate(model, "first", "second")
    both = logits()
    first.merge()
    second.merge()
    assert not torch.equal(logits(), both)
    second.unmerge()
    first.unmerge()
    assert torch.equal(logits(), both)
    second.remove()
    first.remove()
    assert torch.equal(logits(), before)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
def test_biases_beside_codes_train_in_32_bits_whatever_the_layer_computes_in(bert_folder, quantizer, compute):
    from transformers import BertModel, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute)
        if quantizer == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    options = {"dtype": torch.float32, "add_pooling_layer": False}
    model = BertModel.from_pretrained(bert_folder, quantization_config=config, **options)
    adapter = adapt(model, Selective(parameter_types=["bias"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        model(_ids()).last_hidden_state.square().mean().backward()
    dense = model.encoder.layer[0].intermediate.dense
    assert is_quantized(dense.weight)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert dense.bias.grad.abs().sum() > 0


def test_codes_that_an_evaluation_has_put_into_another_order_are_put_back():
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    model = nn.Sequential(layer)
    expected = dequantized(layer, layer.weight)
    layer.support_avx512bf16_for_cpu = True  # as on CPUs that have it, where an evaluation does this:
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    adapt(model, LoRA(r=2))
    # a block's scale has been rounded to bfloat16 by then
    torch.testing.assert_close(dequantized(layer, layer.weight), expected, rtol=2**-8, atol=0)
    x = torch.randn(2, 64)
    with torch.no_grad():
        model.eval()(x)
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(2, -1), rtol=2**-7, atol=1e-2)


def test_numbers_of_eight_bits_whose_scales_are_elsewhere_are_not_read():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ValueError, match="use_dora=True reads the weight of '0', which is offloaded, quantized or not read yet"
    ):
        adapt(model, LoRA(r=2, use_dora=True))
    adapter = adapt(model, LoRA(r=2))
    with pytest.raises(ValueError, match=r"0.weight cannot be merged into: it is offloaded, quantized or"):
        adapter.merge()


def test_codes_of_one_scale_are_made_again_with_one():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_(model, Int8WeightOnlyConfig(granularity=PerTensor()))
    weight = model[0].weight
    torch.testing.assert_close(requantized(dequantized(model[0], weight), weight).scale, weight.scale)


def test_weights_whose_inputs_are_rounded_too_are_not_merged_into():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    adapter = adapt(model, LoRA(r=2))
    with pytest.raises(ValueError, match=r"Int8Tensor with quantized inputs cannot be quantized again"):
        adapter.merge()


def test_layers_that_are_quantized_when_they_move_are_so_before_they_are_adapted():
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    plugin = BitsandbytesPrecision("nf4-dq", dtype=torch.float32, ignore_modules={"1"})
    plugin.convert_module(model)
    model.to("cpu")
    x = torch.randn(3, 64)
    before = model(x).detach()
    adapter = adapt(model, LoRA(r=2, use_dora=True))
    assert is_quantized(model[0].weight)
    torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-6)
    adapter.remove()
    assert torch.equal(model(x), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_lightnings_plugin_quantizes_what_is_adapted(mode, tmp_path):
    import lightning as L
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision
    from torch.utils.data import DataLoader

    from lightning_peft import PeftCallback

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

        def training_step(self, batch, batch_idx):
            return self.body(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    net = Net()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cuda", devices=1, plugins=BitsandbytesPrecision(mode), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[PeftCallback(LoRA(r=2), model="body")],
    )  # fmt: skip
    trainer.fit(net, DataLoader(torch.randn(8, 64), batch_size=4))
    assert is_quantized(net.body[0].weight)
    assert net.body.adapters["default"].state_dict()["0.lora_B"].abs().max() > 0


LOFTQ = LoRA(r=8, lora_alpha=16, init_lora_weights="loftq", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def noted(quantized, llama_folder):
    """The quantized Llama that knows where its weights lie."""

    def load(name):
        model = quantized(name)
        note_full_weights(model, llama_folder)
        return model

    return load


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_loftq_starts_as_the_nearest_of_its_rank_to_what_quantizing_has_lost(noted, llama_folder, quantizer):
    from transformers import LlamaForCausalLM

    full, model = LlamaForCausalLM.from_pretrained(llama_folder), noted(quantizer)
    adapter = adapt(model, LOFTQ)
    for place, layer in adapter.tree.layers_by_module.items():
        if place:
            module = model.get_submodule(place)
            lost = (full.get_submodule(place).weight - dequantized(module, module.weight)).detach().double()
            change = (layer.lora_B.double() @ layer.lora_A.double()).detach() * layer.scale
            # by Eckart and Young: what is left is the root of the sum of the other singular values' squares
            left = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
            torch.testing.assert_close((lost - change).norm(), left, rtol=1e-4, atol=1e-7)


def test_loftqs_start_is_pefts(noted, llama_folder):
    from peft.utils.loftq_utils import _low_rank_decomposition
    from transformers import LlamaForCausalLM

    full, model = LlamaForCausalLM.from_pretrained(llama_folder), noted("nf4")
    adapter = adapt(model, LoRA(r=8, lora_alpha=8, init_lora_weights="loftq", target_modules=["down_proj"]))
    for place, layer in adapter.tree.layers_by_module.items():
        if place:
            module = model.get_submodule(place)
            # what PEFT does with it where there is a GPU; the sign of a pair of singular vectors is anybody's choice
            lost = full.get_submodule(place).weight.detach() - dequantize_4bit(module.weight, module.weight.quant_state)
            found = _low_rank_decomposition(lost, reduced_rank=8)
            expected = found["L"] @ found["R"]
            torch.testing.assert_close(layer.lora_B @ layer.lora_A, expected, rtol=1e-4, atol=1e-5)


def test_loftq_brings_the_model_nearer_to_what_it_was(noted, llama_folder):
    from transformers import LlamaForCausalLM

    full, model = _logits(LlamaForCausalLM.from_pretrained(llama_folder).eval()), noted("nf4")
    before = (_logits(model) - full).norm()
    adapter = adapt(model, LoRA(r=16, init_lora_weights="loftq"))
    assert (_logits(model) - full).norm() < 0.7 * before
    adapter.remove()
    torch.testing.assert_close((_logits(model) - full).norm(), before)


def test_loftq_with_dora_starts_at_the_sum(noted):
    plain, dora = noted("nf4"), noted("nf4")
    adapt(plain, LOFTQ)
    adapt(dora, replace(LOFTQ, use_dora=True))
    torch.testing.assert_close(_logits(dora), _logits(plain), atol=1e-5, rtol=1e-5)


def test_a_loftq_adapter_fits_the_same_codes_alone(noted, quantized, llama_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = noted("nf4")
    adapter = adapt(model, LOFTQ)
    _train(model, adapter)
    adapter.save(tmp_path / "a")
    again = quantized("nf4")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(_logits(again), _logits(model))
    Adapter(again).save(tmp_path / "b")
    with pytest.warns(UserWarning, match="keep the adapter beside the base: it holds what quantizing that has lost"):
        adapter.merge()
    for folder in ("a", "b"):
        for other in (LlamaForCausalLM.from_pretrained(llama_folder), quantized("int8")):
            with pytest.raises(ValueError, match="holds what quantizing that base has lost: load the same weights"):
                load_adapter(other, tmp_path / folder)


@pytest.mark.parametrize("where", ["plain", "unknown"])
def test_loftq_needs_codes_and_what_they_were_before(quantized, build, where):
    model = build("llama") if where == "plain" else quantized("nf4")
    said = {"plain": "is not quantized: load the model in 4 or 8 bits", "unknown": "what .* was before is not known"}
    with pytest.raises(ValueError, match=rf"'loftq' starts as what quantizing has lost, but .*{said[where]}"):
        adapt(model, LOFTQ)
    assert not hasattr(model, "adapters")


def test_layers_that_were_turned_when_they_were_quantized_are_read_turned(tmp_path):
    from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    full = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, n_positions=32))
    full.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**NF4)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    note_full_weights(model, tmp_path)
    for place in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):
        module, expected = model.get_submodule(place), full.get_submodule(place).weight.T
        assert torch.equal(full_weight(module.weight), expected)
        assert (dequantized(module, module.weight) - expected).abs().max() < 0.16 * expected.abs().max()
    adapter = adapt(model, LoRA(r=4, init_lora_weights="loftq"))
    adapter.merge()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("start", [True, "loftq"])
def test_the_card_says_how_the_base_was_quantized_and_code_for_loftq_quantizes_it_so(
    noted, llama_folder, tmp_path, start, quantizer
):
    from transformers import LlamaForCausalLM

    adapter = adapt(noted(quantizer), LoRA(r=2, init_lora_weights=start))
    adapter.save(tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert {"nf4": "(bitsandbytes, 4 bits)", "int8": "(bitsandbytes)"}.get(quantizer, "(torchao)") in text
    assert ("fits the base as it was too" in text) == (start is True)
    assert ("quantization_config={" in text) == (start == "loftq")
    given = json.loads((tmp_path / "a" / "lightning_peft.json").read_text())["base"]["quantization"]
    again = LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=given, dtype=torch.float32)
    load_adapter(again, tmp_path / "a")
