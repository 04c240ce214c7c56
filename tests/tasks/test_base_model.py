"""Folders that are to hold a model: what is missing is named before transformers is asked."""

from __future__ import annotations

import shutil

import pytest
import torch

from lightning_peft import BottleneckAdapter, LoRA, LoReFT, PeftModule, adapt
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.base_source import snapshot
from lightning_peft.tasks.weight_files import WeightFiles, weight_paths

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
    with pytest.raises(ValueError, match=r"activation_checkpointing=9 .* but LlamaForCausalLM has 2; 1 takes all"):
        BaseModel(str(llama_folder), activation_checkpointing=9).load(task_from_config("sft"))
    with pytest.raises(ValueError, match=r"offload_activations=true moves what activation_checkpointing keeps"):
        BaseModel("x", offload_activations=True)
    if not torch.accelerator.is_available():
        base = BaseModel(str(llama_folder), activation_checkpointing=1, offload_activations=True)
        with pytest.raises(ValueError, match="off a device, but there is none"):
            base.load(task_from_config("sft"))
    with pytest.raises(ValueError, match=r"has no field 'gradient_checkpointing'.*activation_checkpointing"):
        BaseModel.of({"name_or_path": "x", "gradient_checkpointing": True})


def test_a_base_that_was_given_offloaded_is_adapted_as_it_is(llama_folder):
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    module = PeftModule(cpu_offload(model, execution_device=torch.device("cpu")), LoRA(r=2), "sft")
    module.configure_model()
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids).logits, expected)


def test_a_base_in_shards_keeps_its_generation_config_and_takes_only_safetensors(llama_folder, tmp_path):
    from transformers import GenerationConfig

    shutil.copytree(llama_folder, tmp_path / "base")
    GenerationConfig(do_sample=True, temperature=0.25).save_pretrained(tmp_path / "base")
    for only in (False, True):
        base = BaseModel(str(tmp_path / "base"), load_in_shards=True, only_safetensors=only)
        model = base.load(task_from_config("sft"))
        assert all(p.is_meta for p in model.parameters())
        assert model.generation_config.temperature == 0.25


def _in_shards(llama_folder, folder):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    other = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for stray in ("consolidated.safetensors", "zz.safetensors", "adapter_model.safetensors"):
        save_file(other, folder / stray)
    (folder / "original").mkdir()
    save_file(other, folder / "original" / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    return model, shards


def test_weights_are_read_from_the_files_that_the_index_names(llama_folder, tmp_path):
    model, shards = _in_shards(llama_folder, tmp_path)
    files = WeightFiles(tmp_path, model)
    assert sorted({s.path.name for s in files.stored.values()}) == shards
    for name, parameter in model.named_parameters():
        assert torch.equal(files.find(name).read(), parameter)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "b.bin"}}']
)
def test_an_index_that_is_damaged_or_points_elsewhere_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged: it has no weight_map|is no safetensors file beside it"):
        weight_paths(tmp_path)


def test_only_the_files_that_are_read_are_fetched(llama_folder, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    _, shards = _in_shards(llama_folder, tmp_path)
    there = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    fetched, cache = set(), tmp_path.parent / f"{tmp_path.name}-cache"

    def hub(name, revision=None, local_files_only=False, allow_patterns=None):
        for file in [] if local_files_only else filter_repo_objects(there, allow_patterns=allow_patterns):
            fetched.add(file)
            cache.mkdir(exist_ok=True)
            shutil.copy(tmp_path / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr("lightning_peft.tasks.base_source.hub_is_reachable", lambda: True)
    snapshot("someone/model", None, fetch=False)
    assert not fetched
    snapshot("someone/model", None)
    assert fetched == {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}


def test_entries_by_their_general_and_their_older_names_reach_the_config(llama_folder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).save_pretrained(tmp_path)
    task = task_from_config("sft")
    given = {"pad_token_id": 0, "num_hidden_layers": 1}
    assert len(BaseModel(str(tmp_path), config=given).load(task).transformer.h) == 1
    with pytest.raises(
        ValueError, match="GPT2Config has no entry 'num_hiden_layers'; did you mean 'num_hidden_layers'"
    ):
        BaseModel(str(tmp_path), config={"num_hiden_layers": 1}).load(task)
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    with pytest.warns(FutureWarning, match="rope_scaling"):
        model = BaseModel(str(llama_folder), config=scaled).load(task)
    assert model.config.rope_parameters["factor"] == 2.0
    # transformers knows this one in config.json, but not as an option of loading
    with pytest.raises(ValueError, match=r"LlamaConfig has no entry 'rope_theta'; did you mean .*'rope_parameters'"):
        BaseModel(str(llama_folder), config={"rope_theta": 500.0}).load(task)
