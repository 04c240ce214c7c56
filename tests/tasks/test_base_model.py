"""Folders that are to hold a model: what is missing is named before transformers is asked."""

from __future__ import annotations

import shutil

import pytest
import torch

from lightning_peft import BottleneckAdapter, LoRA, LoReFT, PeftModule, adapt
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel

TASK = {"name": "text_classification", "labels": ["a", "b"]}


def test_an_existing_folder_without_a_model_says_what_it_lacks(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    base = BaseModel(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no weights .* there is: \['notes.txt'\]$"):
        base.load(task_from_config(TASK))
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no tokenizer \(tokenizer.json, vocab.txt or"):
        base.load_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; there is"):
        base.positions()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(tokenizer.json"):
        BaseModel("x", tokenizer=str(tmp_path)).load_tokenizer()


def test_a_model_without_its_weights_or_its_tokenizer_is_refused(bert_folder, tmp_path):
    shutil.copy(bert_folder / "config.json", tmp_path)
    base = BaseModel(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no weights .*; there is: \['config.json'\]"):
        base.load(task_from_config(TASK))
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer"):
        base.load_tokenizer()
    assert base.positions() == 128
    assert len(BaseModel("x", tokenizer=str(bert_folder)).load_tokenizer()) > 5


def test_an_adapters_folder_given_as_the_model_is_told_apart(build, tmp_path):
    adapt(build("bert"), LoRA(r=2)).save(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="this is an adapter's folder, so give its base as the model"):
        BaseModel(str(tmp_path / "adapter")).load_tokenizer()


def _kept_and_gradients(folder, method, device="cpu", **options):
    """Bytes that a training step keeps for its backward pass, and the adapter's gradients."""
    torch.manual_seed(0)
    module = PeftModule({"name_or_path": str(folder), **options}, method, "sft")
    module.configure_model()
    module.train().to(device)
    ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [5], [9]])).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
    with torch.no_grad():
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device) * 0.1)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    own = {p.data_ptr() for p in module.parameters()}
    module.task.outputs(module.model, batch)  # what it tries first keeps nothing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total = module.task.outputs(module.model, batch).total()
    total.backward()
    saved = {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() not in own}
    return sum(saved.values()), [p.grad for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "method", [LoRA(r=2, lora_dropout=0.3), LoRA(r=2, use_dora=True), BottleneckAdapter(), LoReFT()]
)
@pytest.mark.filterwarnings("ignore:.*Caching is incompatible")
def test_layers_that_are_run_again_keep_less_and_train_alike(llama_folder, method):
    kept, gradients = {}, {}
    for every in (0, 1, 2):
        kept[every], gradients[every] = _kept_and_gradients(llama_folder, method, activation_checkpointing=every)
    assert kept[1] < kept[0]
    for every in (1, 2):
        for found, expected in zip(gradients[every], gradients[0], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_layers_keep_can_wait_in_the_hosts_memory(llama_folder):
    options = {"activation_checkpointing": 1}
    _, expected = _kept_and_gradients(llama_folder, LoRA(r=2), "cuda", **options)
    _, found = _kept_and_gradients(llama_folder, LoRA(r=2), "cuda", **options, offload_activations=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_saves_memory_here_is_not_asked_of_who_loads_the_adapter(llama_folder, tmp_path):
    module = PeftModule({"name_or_path": str(llama_folder), "activation_checkpointing": 1}, LoRA(r=2), "sft")
    module.configure_model()
    module.save_adapter(tmp_path / "adapter")
    assert "activation" not in (tmp_path / "adapter" / "lightning_peft.json").read_text()
    assert PeftModule.from_adapter(tmp_path / "adapter").base.activation_checkpointing == 0


def test_checkpointing_that_cannot_be_is_said_at_once(llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"activation_checkpointing must be 0, or every .* but got -1"):
        BaseModel("x", activation_checkpointing=-1)
    for value in ("1", 1.5):
        with pytest.raises(ValueError, match=r"activation_checkpointing must be 0, or every .* but got"):
            BaseModel("x", activation_checkpointing=value)
    with pytest.raises(ValueError, match=r"offload_activations=true moves what activation_checkpointing keeps"):
        BaseModel("x", offload_activations=True)
    if not torch.accelerator.is_available():
        base = BaseModel(str(llama_folder), activation_checkpointing=1, offload_activations=True)
        with pytest.raises(ValueError, match="off a device, but there is none"):
            base.load(task_from_config("sft"))
    with pytest.raises(ValueError, match=r"has no field 'gradient_checkpointing'.*activation_checkpointing"):
        BaseModel.of({"name_or_path": "x", "gradient_checkpointing": True})
