"""Bases that transformers loads quantized, by a short name or by its own configuration, in every precision."""

from __future__ import annotations

import importlib.util

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import IA3, BottleneckAdapter, LoRA, PeftModule, PromptTuning
from lightning_peft.core.quantized import is_quantized
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.quantization import plain_where_new

pytestmark = [
    pytest.mark.usefixtures("codes_in_order"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
METHODS = [
    LoRA(r=2),
    LoRA(r=2, use_dora=True),
    IA3(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    BottleneckAdapter(),
    PromptTuning(num_virtual_tokens=3),
]


def _trainer(folder, precision="32-true", epochs=1):
    return L.Trainer(
        max_epochs=epochs,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _rows(labels=None):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        ids = torch.randint(3, 90, (8,), generator=generator)
        answers = ids if labels is None else torch.tensor(i % labels)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": answers})
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize("method", METHODS, ids=["lora", "dora", "ia3", "bottleneck", "prompt"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "int8_weight_only"])
def test_a_quantized_base_trains_and_comes_back_from_the_checkpoint(
    llama_folder, tmp_path, quantization, precision, method
):
    L.seed_everything(0, verbose=False)
    module = PeftModule({"name_or_path": str(llama_folder), "quantization": quantization}, method, "sft")
    trainer = _trainer(tmp_path, precision)
    trainer.fit(module, _rows())
    layer = module.model.model.layers[0].mlp.down_proj
    assert is_quantized(layer.weight)
    assert module.model.model.norm.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in kept)
    again = PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert type(again.model.model.layers[0].mlp.down_proj.weight) is type(layer.weight)
    for key, value in module.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[key], value)
    _trainer(tmp_path, precision, epochs=2).fit(again, _rows(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_layers_of_four_bits_multiply_in_the_trainers_precision(llama_folder, tmp_path, precision):
    module = PeftModule({"name_or_path": str(llama_folder), "quantization": "nf4"}, LoRA(r=2), "sft")
    _trainer(tmp_path, precision).fit(module, _rows())
    layer = module.model.model.layers[0].mlp.down_proj
    assert layer.compute_dtype == (torch.bfloat16 if precision == "bf16-mixed" else torch.float32)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "int8_weight_only"])
def test_a_new_head_is_a_plain_layer_that_trains(bert_folder, tmp_path, quantization):
    module = PeftModule(
        {"name_or_path": str(bert_folder), "quantization": quantization},
        LoRA(r=2),
        {"name": "text_classification", "labels": ["a", "b"]},
    )
    module.configure_model()
    head = module.model.classifier
    assert isinstance(head, nn.Linear)
    assert not is_quantized(head.weight)
    assert 0 < head.weight.std() < 0.1  # drawn as transformers draws it, 0.02
    assert is_quantized(module.model.bert.encoder.layer[0].intermediate.dense.weight)
    before = {k: v.clone() for k, v in module.adapter.state_dict().items()}
    _trainer(tmp_path).fit(module, _rows(labels=2))
    moved = [k for k, v in module.adapter.state_dict().items() if not torch.equal(v, before[k])]
    assert any("classifier" in k for k in moved)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "int8_weight_only"])
@pytest.mark.filterwarnings("ignore:.*merged weights are quantized again")
def test_a_merged_quantized_model_is_loaded_by_transformers_with_its_head(bert_folder, tmp_path, quantization):
    from transformers import AutoModelForSequenceClassification

    module = PeftModule(
        {"name_or_path": str(bert_folder), "quantization": quantization},
        LoRA(r=2, init_lora_weights="pissa"),
        {"name": "text_classification", "labels": ["a", "b"]},
    )
    module.configure_model()
    _trainer(tmp_path).fit(module, _rows(labels=2))
    module.adapter.save_merged(tmp_path / "merged")
    module.adapter.merge()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected, found = module.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_of_a_models_own_kind_stay_what_they_are():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Sequential(Router(4, 4))
    plain_where_new(model)
    assert type(model[0]) is Router


def test_any_quantization_that_transformers_knows_can_be_given_as_it_is(llama_folder):
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    module = PeftModule({"name_or_path": str(llama_folder), "quantization": given}, LoRA(r=2), "sft")
    module.configure_model()
    assert module.model.model.layers[0].mlp.down_proj.weight.quant_type == "fp4"
    assert module.hparams["model"]["quantization"] == given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nf5", r"must be 'nf4', 'int8', 'int8_weight_only', or a dictionary .* but got 'nf5'.*'nf4'"),
        ({"quant_method": "bitsandbytes"}, r"must say load_in_4bit or load_in_8bit, one of them true"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "xx4"}, r"bnb_4bit_quant_type must be 'nf4' or 'fp4', .* 'xx4'"),
        ({"quant_method": "fp8"}, r"must say its quant_method, bitsandbytes or torchao, but got 'fp8'"),
        (4, "but got 4"),
        ({"bits": 4}, r"must say its quant_method, bitsandbytes or torchao, but got None"),
        ({"quant_method": "torch_ao"}, r"but got 'torch_ao'.*did you mean 'torchao'"),
    ],
)
def test_a_quantization_that_is_none_is_said_at_once(given, said):
    with pytest.raises(ValueError, match=said):
        BaseModel("x", quantization=given)


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("int8_weight_only", "torchao")])
def test_a_package_that_is_not_there_is_named_with_how_to_get_it(monkeypatch, name, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else found(n, *a))
    for given in (name, {"quant_method": package, "load_in_4bit": True}):
        with pytest.raises(ValueError, match=rf"needs {package}: pip install 'lightning-peft\[quantization\]'"):
            BaseModel("x", quantization=given)


def test_moments_of_eight_bits_come_from_bitsandbytes_and_from_the_checkpoint(llama_folder, tmp_path):
    def module():
        # moments of fewer than 4,096 numbers stay in 32 bits
        return PeftModule(
            str(llama_folder), LoRA(r=32, target_modules=["lm_head"]), "sft", {"name": "AdamW8bit", "lr": 1e-2}
        )

    trainer = _trainer(tmp_path)
    trainer.fit(module(), _rows())
    moments = [state["state1"] for state in trainer.optimizers[0].state.values()]
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, module):
            seen.extend(state["state1"].clone() for state in trainer.optimizers[0].state.values())

    again = _trainer(tmp_path, epochs=2)
    again.callbacks.append(Look())
    again.fit(module(), _rows(), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 2 * trainer.global_step
    assert len(seen) == len(moments)
    for restored, moment in zip(seen, moments, strict=True):
        assert restored.dtype == moment.dtype
        assert torch.equal(restored, moment)


def test_an_optimizer_of_fewer_bits_without_its_package_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a))
    with pytest.raises(ValueError, match=r"'AdamW8bit' is unknown; .* pip install 'lightning-peft\[quantization\]'"):
        PeftModule("x", LoRA(), "sft", {"name": "AdamW8bit"})
