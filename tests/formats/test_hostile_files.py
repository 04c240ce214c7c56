"""An adapter's folder or a checkpoint from elsewhere: nothing in it runs, leads out of it or takes memory unseen."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import HFPeft, LoRA, PeftModule, PromptTuning, SparseTuning, adapt, load_adapter
from lightning_peft.cli.commands import load
from lightning_peft.formats.reading import read_checkpoint
from lightning_peft.methods.config import method_from_config
from tests.formats.marks import Marks

TASK = {"name": "text_classification", "labels": ["a", "b"]}
TENSORS, MANIFEST, PEFT = "adapter_model.safetensors", "lightning_peft.json", "adapter_config.json"


@pytest.fixture
def saved(build, tmp_path):
    return adapt(build("bert"), LoRA(r=2)).save(tmp_path / "a")


@pytest.fixture
def change():
    """Changes a JSON file in a folder."""

    def make(folder, file, by):
        path = folder / file
        content = json.loads(path.read_text())
        by(content)
        path.write_text(json.dumps(content))

    return make


def _header(folder, **tensors):
    """A file whose header says whatever it is told, and which holds 64 bytes."""
    header = json.dumps(tensors).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def test_pickles_in_a_folder_are_never_opened(build, saved, tmp_path):
    trap = tmp_path / "opened"
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "training_args.bin", TENSORS):
        (saved / name).write_bytes(pickle.dumps(Marks(trap)))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_adapter(build("bert"), saved)
    (saved / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is no file"):
        load_adapter(build("bert"), saved)
    assert not trap.exists()


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "opened"
    torch.save({"state_dict": {"a": Marks(trap)}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="but only tensors and plain values are opened"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not trap.exists()


def test_a_checkpoint_with_packed_parts_is_refused_before_they_are_unpacked(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(10)}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as whole, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as packed:
        for part in whole.infolist():
            content = whole.read(part) if not part.filename.endswith("/data/0") else bytes(10**8)
            packed.writestr(part.filename, content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.ckpt").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"is compressed, which torch.save never does"):
        read_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}, "does not lie within the 64 bytes"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}, "does not lie within"),
        (
            {
                "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
                "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
            },
            "overlap, or leave gaps",
        ),
        ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}, "overlap, or leave gaps"),
        ({"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}, r"has the shape \[-4, -4\]"),
        ({"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}, "is of the dtype 'F99', expected one of"),
        ({"a": {"dtype": "F32"}}, "cannot be read"),
        ({"a": 3}, "cannot be read"),
    ],
    ids=["terabyte", "overflow", "overlap", "gap", "negative", "dtype", "incomplete", "number"],
)
def test_a_header_that_claims_what_the_file_does_not_have_is_refused(build, saved, header, said):
    _header(saved, **header)
    with pytest.raises(ValueError, match=said):
        load_adapter(build("bert"), saved)


def test_a_header_that_claims_its_own_length_is_refused(build, saved):
    (saved / TENSORS).write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ValueError, match="a header of 1,099,511,627,776 is to follow"):
        load_adapter(build("bert"), saved)
    deep = b"[" * 100_000
    (saved / TENSORS).write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(ValueError, match=r"nests its values too deeply|cannot be read"):
        load_adapter(build("bert"), saved)


def test_a_file_far_larger_than_its_adapter_is_refused_before_it_is_read(build, saved):
    """A terabyte of nothing takes no room on a disk."""
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"base_model.model.x": entry}).encode()
    with (saved / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**40)
    with pytest.raises(ValueError, match=r"\d+ missing, such as .*1 unexpected, such as base_model.model.x"):
        load_adapter(build("bert"), saved)
    (saved / MANIFEST).unlink()  # as peft would have written it
    with pytest.raises(ValueError, match="holds 274,877,906,944 numbers, but the adapter and its base have"):
        load_adapter(build("bert"), saved)


HUGE = {
    "lora": (LoRA(r=2), {"r": 10**9}),
    "lora_by_module": (LoRA(r=2), {"rank_pattern": {"query": 10**9}}),
    "prompt": (PromptTuning(4), {"num_virtual_tokens": 10**9}),
    "bridge": (HFPeft({"peft_type": "HRA", "r": 4}), {"config": {"peft_type": "HRA", "r": 10**9}}),
}


@pytest.mark.parametrize(("method", "options"), HUGE.values(), ids=HUGE)
def test_options_that_ask_for_more_than_the_file_holds_are_refused(build, tmp_path, change, method, options):
    folder = adapt(build("bert"), method).save(tmp_path / "a")
    change(folder, MANIFEST, lambda content: content["method"].update(options))
    model = build("bert")
    with pytest.raises(ValueError, match=r"account for .* at most|must be 1 to 1000"):
        load_adapter(model, folder)
    assert not hasattr(model, "adapters")


def test_an_adapter_of_peft_with_a_rank_of_a_billion_is_refused(build, saved, change):
    (saved / MANIFEST).unlink()
    change(saved, PEFT, lambda content: content.update(r=10**9))
    with pytest.raises(ValueError, match=r"the adapter's options ask for .* numbers and more, but its tensors"):
        load_adapter(build("bert"), saved)


def test_a_checkpoint_with_a_rank_of_a_billion_is_refused(tmp_path, bert_folder):
    module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6"}
    module.on_save_checkpoint(checkpoint)
    hyper = dict(module.hparams)
    hyper["method"] = {**hyper["method"], "r": 10**9}
    torch.save({**checkpoint, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="the adapter's options ask for"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")


LONG = "9" * 4000
TOO_MUCH = {
    "dimensions": ("[" + ",".join(["9999999999"] * 200_000) + "]", "a shape that no tensor has: .*characters more"),
    "digits": ("[" + ",".join([LONG] * 50) + "]", "has a number of 4,000 digits"),
    "large": (f"[{2**63}, 0]", r"'x' has the shape \[9223372036854775808, 0\]"),
    "words": ('["' + "x" * 10**6 + '"]', "'x' has the shape .*characters more"),
}


@pytest.mark.parametrize(("shape", "said"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_shape_whose_product_takes_an_age_is_refused_in_a_sentence_that_one_can_read(build, saved, shape, said):
    """The first of them took some minutes, and the error was as long as the file."""
    header = f'{{"x": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 64]}}}}'.encode()
    (saved / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ValueError, match=said) as refused:
        load_adapter(build("bert"), saved)
    assert len(str(refused.value)) < 2000


def test_a_tensors_name_as_long_as_the_file_is_not_quoted_whole(build, saved):
    tensors = load_file(saved / TENSORS)
    save_file({**tensors, "x" * 10**6: torch.zeros(1)}, saved / TENSORS)
    with pytest.raises(ValueError, match=r"1 unexpected, such as x+\.\.\. \(999,800 characters more\)"):
        load_adapter(build("bert"), saved)


def test_a_number_of_many_digits_and_a_word_of_many_letters_are_refused_briefly(build, saved, change):
    change(saved, MANIFEST, lambda content: content["method"].update(bias="x" * 10**6))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: LoRA: bias .*characters more") as refused:
        load_adapter(build("bert"), saved)
    assert len(str(refused.value)) < 2000
    assert refused.value.__cause__ is None  # which a traceback would print whole
    whole = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(whole.replace('"format": 1', f'"format": {LONG}'))
    with pytest.raises(ValueError, match=f"{MANIFEST} is no JSON.*has a number of 4,000 digits"):
        load_adapter(build("bert"), saved)


def test_what_is_said_twice_is_refused(build, saved):
    """Of two shapes under one name we took the last, and who knows which one another reader takes."""
    raw = (saved / TENSORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    name = next(k for k in json.loads(raw[8 : 8 + length]) if k != "__metadata__")
    entry = f'{json.dumps(name)}: {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, '
    header = b"{" + entry.encode() + raw[9 : 8 + length]
    (saved / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    with pytest.raises(ValueError, match=rf"{TENSORS} cannot be read.*it says '{name}' twice"):
        load_adapter(build("bert"), saved)
    (saved / TENSORS).write_bytes(raw)
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text.replace('"format": 1', '"format": 1, "format": 1'))
    with pytest.raises(ValueError, match=f"{MANIFEST} is no JSON.*it says 'format' twice"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[1]", "nul", '"x"', "\x00", "1" * 10_000])
@pytest.mark.parametrize("file", [MANIFEST, PEFT])
def test_json_that_is_none_is_refused(build, saved, content, file):
    if file == PEFT:
        (saved / MANIFEST).unlink()
    (saved / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        load_adapter(build("bert"), saved)


def test_json_that_is_too_long_is_refused_before_it_is_read(build, saved):
    with (saved / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="and 67,108,864 are read at most"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("file", [MANIFEST, PEFT, TENSORS, "tokenizer.json", "notes"])
def test_a_link_that_leads_out_of_the_folder_is_refused(build, saved, tmp_path, file):
    outside = tmp_path / "outside"
    outside.write_bytes((saved / file).read_bytes() if (saved / file).exists() else b"{}")
    (saved / file).unlink(missing_ok=True)
    (saved / file).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{file} is a link that leads out of the folder"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("link", ["chat_templates/x.jinja", "chat_templates", "a/b/c/notes"])
@pytest.mark.parametrize("target", ["outside/x.jinja", "outside", "nowhere"])
def test_a_link_below_the_folder_that_leads_out_of_it_is_refused(build, saved, tmp_path, link, target):
    """transformers reads chat templates out of a folder in the folder."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jinja").write_text("secret")
    (saved / link).parent.mkdir(parents=True, exist_ok=True)
    (saved / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"{link} is a link that leads out of the folder, to .*/{target}"):
        load_adapter(build("bert"), saved)


def test_links_that_lead_in_a_circle_are_no_files(build, saved):
    (saved / "x").symlink_to("y")
    (saved / "y").symlink_to("x")
    load_adapter(build("bert"), saved)
    (saved / TENSORS).unlink()
    (saved / TENSORS).symlink_to(TENSORS)
    with pytest.raises(FileNotFoundError, match=f"{TENSORS} is no file"):
        load_adapter(build("bert"), saved)


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(build, saved, tmp_path):
    (saved / "inner").write_bytes((saved / PEFT).read_bytes())
    (saved / PEFT).unlink()
    (saved / PEFT).symlink_to("inner")
    load_adapter(build("bert"), saved)
    cached = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    (cached / "chat_templates").mkdir()
    (saved / "chat_templates").mkdir()
    (saved / "chat_templates" / "a.jinja").write_text("x")
    for file in (MANIFEST, PEFT, TENSORS, "chat_templates/a.jinja"):
        blob = blobs / file.replace("/", "-")
        blob.write_bytes((saved / file).read_bytes())
        (cached / file).symlink_to(os.path.relpath(blob, (cached / file).parent))
    load_adapter(build("bert"), cached)


def test_a_pipe_in_a_files_place_is_not_waited_for(build, saved):
    (saved / TENSORS).unlink()
    os.mkfifo(saved / TENSORS)
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("target", ["os.system", "lightning_peft.methods.os", "lightning_peft.PeftModule", "LoRA", ""])
def test_only_methods_of_this_package_are_made(build, saved, change, target):
    with pytest.raises(ValueError, match="is unknown"):
        method_from_config({"_target_": target})
    change(saved, MANIFEST, lambda content: content["method"].update(_target_=target))
    with pytest.raises(ValueError, match=f"{MANIFEST}: method .* is unknown"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(\w+\.?)+q", "(.*)*", ".*.*.*.*.*.*.*q", "a{4000000000}" + "(" * 90])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_on_which_matching_would_hang_are_refused(build, saved, change, pattern, option):
    value = {pattern: 3} if option == "rank_pattern" else pattern
    change(saved, MANIFEST, lambda content: content["method"].update({option: value}))
    with pytest.raises(ValueError, match=f"{option}: .* (may take longer to match|is no regular expression)"):
        load_adapter(build("bert"), saved)


def test_places_outside_of_a_weight_are_refused(build, tmp_path):
    folder = adapt(build("bert"), SparseTuning(r=2)).save(tmp_path / "a")
    tensors = load_file(folder / TENSORS)
    key = next(k for k in tensors if "indices" in k)
    tensors[key][1, 3] = 4000
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match=r"shira_indices of .* has places outside of \(\d+, \d+\)"):
        load_adapter(build("bert"), folder)


def test_numbers_of_another_kind_are_refused_and_other_widths_are_taken(build, saved):
    tensors = load_file(saved / TENSORS)
    save_file({k: t.bfloat16() for k, t in tensors.items()}, saved / TENSORS)
    load_adapter(build("bert"), saved)
    save_file({k: t.long() for k, t in tensors.items()}, saved / TENSORS)
    with pytest.raises(ValueError, match=r"is torch.int64, expected torch.float32; .*and \d+ more"):
        load_adapter(build("bert"), saved)
    # finite as it stands there, and not in float32
    save_file({k: t.double() * 0 + 1e300 for k, t in tensors.items()}, saved / TENSORS)
    with pytest.raises(ValueError, match="has NaN or infinite values in"):
        load_adapter(build("bert"), saved)


@pytest.fixture
def exported(bert_folder, tmp_path):
    module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
    module.configure_model()
    return module.save_adapter(tmp_path / "exported")


BASES = {
    "code": ({"config": {"trust_remote_code": True}}, "has no entry 'trust_remote_code'; code that comes with"),
    "kernel": ({"config": {"attn_implementation": "somebody/kernel"}}, "would fetch code from the hub"),
    "pickle": ({"config": {"use_safetensors": False}}, "has no entry 'use_safetensors'"),
    "weights": ({"config": {"weights_only": False}}, "has no entry 'weights_only'"),
    "field": ({"only_safetensors": False}, "has another 'only_safetensors' than is expected"),
    "name": ({"name_or_path": 3}, "has another 'name_or_path' than is expected"),
}


@pytest.mark.parametrize(("said", "error"), BASES.values(), ids=BASES)
def test_a_file_cannot_choose_how_its_base_is_loaded(exported, change, said, error):
    change(exported, MANIFEST, lambda content: content["info"]["model"].update(said))
    with pytest.raises(ValueError, match=error):
        PeftModule.from_adapter(exported)


def test_a_base_that_a_file_names_is_loaded_from_safetensors_alone(exported, change, bert_folder, tmp_path):
    from transformers import AutoModel

    other = tmp_path / "pickled"
    other.mkdir()
    for file in bert_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModel.from_pretrained(bert_folder).state_dict(), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    change(exported, MANIFEST, lambda content: content["info"]["model"].update(name_or_path=str(other)))
    with pytest.raises(FileNotFoundError, match=r"has no weights as model.safetensors; give the base yourself"):
        PeftModule.from_adapter(exported)
    # unless it is the user who names it
    assert load(str(exported), str(other)).adapter.method == LoRA(r=2)
    assert load(str(exported), str(bert_folder)).base.name_or_path == str(bert_folder)


def test_code_beside_a_base_is_not_run(exported, change, bert_folder, tmp_path):
    other, trap = tmp_path / "coded", tmp_path / "run"
    other.mkdir()
    for file in bert_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "mine.py").write_text(f"open({str(trap)!r}, 'w')\nfrom transformers import BertConfig as Mine")
    change(other, "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Mine"}))
    change(exported, MANIFEST, lambda content: content["info"]["model"].update(name_or_path=str(other)))
    with pytest.raises(ValueError, match="custom code"):
        PeftModule.from_adapter(exported)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ({"generation": {"custom_generate": "somebody/code"}}, "generation has no option 'custom_generate'"),
        ({"generation": {"trust_remote_code": True}}, "generation has no option 'trust_remote_code'"),
        ({"task": {"name": "sft", "chat_template": "/home/secret.jinja"}}, "names the file '/home/secret.jinja'"),
        ({"task": "sft"}, "the task must be a dictionary"),
        ({"task": {"name": "os"}}, "task 'os' is unknown"),
    ],
)
def test_a_file_cannot_choose_what_runs_in_a_task(exported, change, info, error):
    change(exported, MANIFEST, lambda content: content["info"].update(info))
    with pytest.raises(ValueError, match=error):
        PeftModule.from_adapter(exported)


@pytest.mark.parametrize("key", ["vocab_file", "fast_tokenizer_files", "source_spm"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("named", ["../../secret", "/etc/passwd", ["../tokenizer.1.json"]])
def test_a_tokenizer_cannot_name_files_elsewhere(build, saved, named, file, key):
    (saved / file).write_text(json.dumps({"pad_token": "</pad>", key: named}))
    with pytest.raises(ValueError, match="but a tokenizer's files lie beside it"):
        load_adapter(build("bert"), saved)


@pytest.mark.parametrize("form", [2, 99])
def test_a_file_of_a_later_version_says_so(build, saved, change, form, tmp_path):
    whole = (saved / MANIFEST).read_text()
    change(saved, MANIFEST, lambda content: (content.clear(), content.update(format=form)))
    with pytest.raises(ValueError, match=f"{MANIFEST} is of format {form}, and this version .* reads formats up to 1"):
        load_adapter(build("bert"), saved)
    (saved / MANIFEST).write_text(whole)
    tensors = load_file(saved / TENSORS)
    save_file(tensors, saved / TENSORS, metadata={"format": "pt", "lightning_peft_format": str(form)})
    with pytest.raises(ValueError, match=f"{TENSORS} is of format {form}"):
        load_adapter(build("bert"), saved)


def test_a_checkpoint_of_a_later_version_says_so(tmp_path, bert_folder):
    module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**checkpoint, "lightning_peft": {"format": 2}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="record of its adapters: it is of format 2, and this version"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")
    torch.save({**checkpoint, "lightning_peft": {"format": 1, "methods": 3}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"it has no model, methods, base.* or something else there"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_a_checkpoint_cannot_say_that_its_base_need_not_be_checked(tmp_path, bert_folder):
    module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    hyper = {**module.hparams, "check_base": False}
    torch.save({**checkpoint, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="which only its user can: check_base"):
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt")
