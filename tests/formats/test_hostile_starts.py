"""What a file says that its adapter started from is read by nobody: the numbers are in the file."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from lightning_peft import HFPeft, PeftModule, PromptTuning, adapt, load_adapter
from tests.formats.marks import Marks

MANIFEST, PEFT = "lightning_peft.json", "adapter_config.json"
TEXT = {
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "hello",
    "tokenizer_name_or_path": "somebody/tokenizer",
}
TASK = {"name": "text_classification", "labels": ["a", "b"]}
MULTITASK = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4, "num_tasks": 1}


@pytest.fixture
def elsewhere(tmp_path):
    """A pickle and a tokenizer's folder that lie outside, and where it is seen that the pickle was opened."""
    (tmp_path / "prompt.bin").write_bytes(pickle.dumps(Marks(tmp_path / "opened")))
    return tmp_path


def _told(folder, file, options):
    """The file with other options of the method."""
    content = json.loads((folder / file).read_text())
    method = content.get("method", content)
    method.get("config", method).update(options)
    (folder / file).write_text(json.dumps(content))


def _from(start, elsewhere):
    path = str(elsewhere / "prompt.bin")
    return {
        "pickle": {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path},
        "shared": {"prompt_tuning_init": "ONLY_SOURCE_SHARED", "prompt_tuning_init_state_dict_path": path},
        "text": TEXT,
        "code": {**TEXT, "tokenizer_kwargs": {"trust_remote_code": True}},
    }[start]


@pytest.mark.parametrize("start", ["pickle", "shared", "text", "code"])
@pytest.mark.parametrize("file", [MANIFEST, PEFT])
def test_a_prompt_of_peft_loads_without_what_the_file_says_that_it_started_from(build, elsewhere, file, start):
    saved = adapt(build("llama"), HFPeft(MULTITASK))
    folder = saved.save(elsewhere / "a")
    if file == PEFT:
        (folder / MANIFEST).unlink()
    _told(folder, file, _from(start, elsewhere))
    found = load_adapter(build("llama"), folder)
    assert {n: t.tolist() for n, t in found.state_dict().items()} == {
        n: t.tolist() for n, t in saved.state_dict().items()
    }
    assert not (elsewhere / "opened").exists()


def test_a_prompt_from_a_text_loads_without_its_tokenizer(build, elsewhere):
    saved = adapt(build("llama"), PromptTuning(4))
    folder = saved.save(elsewhere / "a")
    _told(folder, MANIFEST, TEXT)
    found = load_adapter(build("llama"), folder)
    assert found.method == PromptTuning(4, **TEXT)  # what it was made by is still said
    (name,) = found.state_dict()
    assert torch.equal(found.state_dict()[name], saved.state_dict()[name])
    # unless it is the user who wants such a one
    with pytest.raises(OSError, match=r"offline|tokenizer"):
        adapt(build("llama"), PromptTuning(4, **TEXT))


def test_an_adapter_of_a_whole_module_loads_without_its_tokenizer(bert_folder, tmp_path):
    module = PeftModule(str(bert_folder), PromptTuning(4), TASK)
    module.configure_model()
    folder = module.save_adapter(tmp_path / "a")
    _told(folder, MANIFEST, TEXT)
    found = PeftModule.from_adapter(folder)
    prompt = "prompt_embeddings"
    (saved,) = (t for n, t in module.adapter.state_dict().items() if n.endswith(prompt))
    (read,) = (t for n, t in found.adapter.state_dict().items() if n.endswith(prompt))
    assert torch.equal(read, saved)


def test_a_checkpoint_loads_without_the_tokenizer_that_its_prompt_started_from(bert_folder, tmp_path):
    tokenized = {**TEXT, "tokenizer_name_or_path": str(bert_folder)}
    module = PeftModule(str(bert_folder), PromptTuning(4, **tokenized), TASK)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6"}
    module.on_save_checkpoint(checkpoint)
    checkpoint["lightning_peft"]["methods"]["default"].update(TEXT)
    hyper = {**module.hparams, "method": {**module.hparams["method"], **TEXT}}
    torch.save({**checkpoint, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    found = PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert found.method == PromptTuning(4, **TEXT)
    for name, tensor in module.adapter.state_dict().items():
        assert torch.equal(found.adapter.state_dict()[name], tensor)


def test_after_a_load_that_failed_a_fresh_prompt_is_made_from_its_text_again(build, elsewhere):
    folder = adapt(build("llama"), PromptTuning(4)).save(elsewhere / "a")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(build("llama", seed=1), folder)
    with pytest.raises(OSError, match=r"offline|tokenizer"):
        adapt(build("llama"), PromptTuning(4, **TEXT))
