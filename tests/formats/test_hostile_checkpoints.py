"""A checkpoint from elsewhere: it loads right or is refused by name; nothing it says runs, or turns a check off."""

from __future__ import annotations

import sys
import zipfile
from collections import Counter, OrderedDict

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PeftCallback, PeftModule, load_from_checkpoint
from lightning_peft.formats.reading import read_checkpoint

PARSER = "lightning.pytorch.cli.instantiate_module"
TASK = {"name": "text_classification", "labels": ["a", "b"]}


class Part:
    """What a command line makes of a class's name."""


class Net(L.LightningModule):
    """One layer, and arguments of the kinds that a command line fills."""

    def __init__(self, extra: Part | None = None, width: int = 4, name: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, width)
        self.extra = extra

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 4), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def changed(trainer, tmp_path):
    """A checkpoint of `Net` in which something is changed."""

    def make(by):
        t = trainer(PeftCallback(LoRA(r=2), "layer", print_plan=False), max_epochs=1)
        t.fit(Net())
        t.save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        by(content)
        torch.save(content, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return make


@pytest.fixture
def changed_module(trainer, tmp_path, bert_folder):
    """A checkpoint of a PeftModule in which something is changed."""

    def make(by):
        module = PeftModule(str(bert_folder), LoRA(r=2), TASK)
        module.configure_model()
        content = {"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}
        module.on_save_checkpoint(content)
        content["hyper_parameters"] = dict(module.hparams)
        by(content)
        torch.save(content, tmp_path / "b.ckpt")
        return tmp_path / "b.ckpt"

    return make


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A class in a module that can be imported and notes that it was; and the note's path."""
    note = tmp_path / "imported"
    text = f"open({str(note)!r}, 'w')\nclass Evil: pass\n"
    (tmp_path / "trapmodule.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"class_path": "trapmodule.Evil"}, note
    sys.modules.pop("trapmodule", None)


def test_a_class_that_a_checkpoint_names_is_neither_imported_nor_made(changed, trap):
    named, note = trap
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": named}))
    with pytest.raises(ValueError, match=r"a.ckpt names the class 'trapmodule.Evil' for 'extra', .*, extra=\.\.\.\)"):
        load_from_checkpoint(Net, path)
    assert not note.exists()
    # what the user gives stands above it
    assert isinstance(load_from_checkpoint(Net, path, extra=Part()).extra, Part)
    assert not note.exists()


def test_no_spelling_of_a_class_is_imported(changed, trap):
    named, note = trap
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": [{"a": named}]}))
    with pytest.raises(ValueError, match=r"a.ckpt names the class 'trapmodule.Evil' for 'extra'"):
        load_from_checkpoint(Net, path)
    path = changed(lambda c: c.update(hyper_parameters={"_instantiator": PARSER, "extra": "trapmodule.Evil"}))
    assert load_from_checkpoint(Net, path).extra == "trapmodule.Evil"
    assert not note.exists()


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_options_of_former_versions_are_refused(changed, changed_module, trap, key):
    named, note = trap
    said = {key: {"_instantiator": PARSER, "extra": named}}
    with pytest.raises(ValueError, match=f"a.ckpt has options of the module under '{key}', but they are read from"):
        load_from_checkpoint(Net, changed(lambda c: c.update(said)))

    def unchecked(content):
        content[key] = {"check_base": False}
        content["lightning_peft"]["base"]["fingerprint"] = "0" * 16

    with pytest.raises(ValueError, match=f"b.ckpt has options of the module under '{key}', but they are read from"):
        PeftModule.load_from_checkpoint(changed_module(unchecked))
    assert not note.exists()


def test_the_class_of_the_options_is_not_the_files_choice(changed):
    with pytest.raises(ValueError, match=r"a.ckpt has options of the module under 'hparams_type'"):
        load_from_checkpoint(Net, changed(lambda c: c.update(hparams_type=torch.device)))


@pytest.mark.parametrize("option", ["method", "model", "task"])
def test_a_peft_module_is_built_without_a_parser(changed_module, trap, option):
    named, note = trap
    path = changed_module(lambda c: c["hyper_parameters"].update({"_instantiator": PARSER, option: named}))
    with pytest.raises(ValueError, match=f"b.ckpt names the class 'trapmodule.Evil' for '{option}'"):
        PeftModule.load_from_checkpoint(path)
    path = changed_module(lambda c: c["hyper_parameters"].update({"_instantiator": PARSER}))
    assert isinstance(PeftModule.load_from_checkpoint(path), PeftModule)
    assert not note.exists()


@pytest.mark.parametrize("name", ["check_base", "generation"])
def test_all_options_cannot_be_one_of_them(changed_module, name):
    path = changed_module(lambda c: c.update(hparams_name=name))
    with pytest.raises(ValueError, match=f"b.ckpt gives all its options to '{name}', which is one of them"):
        PeftModule.load_from_checkpoint(path)


def test_a_checkpoint_of_lightnings_command_line_loads_with_what_it_built_given_again(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2}}
    callback = {"class_path": "lightning_peft.PeftCallback", "init_args": {"method": method, "model": "layer"}}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"callbacks": [callback], "accelerator": "cpu", "max_epochs": 1, **quiet}
    for extra in (None, {"class_path": f"{__name__}.Part"}):
        args = {"seed_everything": 0, "trainer": options, "model": {"width": 3, "extra": extra}}
        cli = LightningCLI(Net, run=False, args=args, save_config_callback=None)
        cli.trainer.fit(cli.model)
        cli.trainer.save_checkpoint(tmp_path / "c.ckpt")
        assert torch.load(tmp_path / "c.ckpt", weights_only=True)["hyper_parameters"]["_instantiator"] == PARSER
        given = {} if extra is None else {"extra": cli.model.extra}
        again = load_from_checkpoint(Net, tmp_path / "c.ckpt", **given)
        x = torch.ones(2, 4)
        assert torch.equal(again.layer(x), cli.model.layer(x))


def test_a_rank_of_a_billion_is_not_vouched_for_by_tensors_that_repeat_a_number(changed):
    def expanded(content):
        rank = 200_000_000
        content["lightning_peft"]["methods"]["default"]["r"] = rank
        for key, tensor in content["state_dict"].items():
            shape = (rank, tensor.shape[1]) if key.endswith("lora_A") else (tensor.shape[0], rank)
            content["state_dict"][key] = torch.zeros(1).expand(shape)

    with pytest.raises(ValueError, match=r"a.ckpt has [\d,]+ bytes, but its tensors ask for .*: they repeat a few"):
        load_from_checkpoint(Net, changed(expanded))


def test_a_rank_of_a_million_is_not_vouched_for_by_tensors_that_share_their_numbers(changed):
    """Each of them is small enough."""

    def shared(content):
        content["lightning_peft"]["methods"]["default"]["r"] = 2_000_000
        one = torch.zeros(1).expand(4_000_000)
        content["state_dict"] = {**content["state_dict"], **{f"more.{i}": one for i in range(1000)}}

    with pytest.raises(ValueError, match=r"options ask for [\d,]+ numbers and more"):
        load_from_checkpoint(Net, changed(shared))


REPEATED = torch.arange(2).tolist()
for _ in range(60):
    REPEATED = [REPEATED, REPEATED]
ITSELF: list[object] = []
ITSELF.append(ITSELF)
KEY: tuple[object, ...] = (1,)
for _ in range(20):  # small enough to be written
    KEY = (KEY, KEY)
ASKING = {
    "bytearray": (lambda: bytearray(100), "holds an object of bytearray"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "holds an object of torch._utils._rebuild_sparse_tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "holds an object of torch._utils._rebuild_meta_tensor_no_storage"),
    "repeated": (lambda: REPEATED, "repeats its values so often that"),
    "itself": (lambda: ITSELF, "a value in it contains itself"),
    "key": (lambda: {KEY: 1}, "repeats its values so often that"),
}


@pytest.mark.parametrize(("make", "said"), ASKING.values(), ids=ASKING)
def test_values_that_take_more_than_their_bytes_are_refused(changed, make, said):
    path = changed(lambda c: c.update(more=make()))
    with pytest.raises(ValueError, match=f"a.ckpt.*{said}"):
        load_from_checkpoint(Net, path)


def test_a_run_that_goes_on_asks_the_same_of_its_checkpoint(changed, trainer):
    path = changed(lambda c: c.update(more=bytearray(100)))
    going_on = trainer(PeftCallback(LoRA(r=2), "layer", print_plan=False), max_epochs=2)
    with pytest.raises(ValueError, match=r"a.ckpt holds an object of bytearray"):
        going_on.fit(Net(), ckpt_path=path, weights_only=True)


def _written(path, content, instructions):
    """Writes instructions in the place of those that torch wrote for ``content``."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        parts = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, part in parts.items():
            file.writestr(name, instructions if name.endswith("data.pkl") else part)


NAMED_AGAIN = b"]q\x00(" + b"K\x01" * 1000 + b"e"  # a list of a thousand ones, kept under 0
INSTRUCTIONS = {
    # bytearray(2 GiB), and sets, keys and strings that are made of one value a thousand times
    "bytearray": (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", "holds an object of bytearray"),
    "storage": (b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R", "has torch.storage.UntypedStorage called"),
    "sets": (NAMED_AGAIN + b"c__builtin__\nset\nq\x01h\x00\x85R" + b"h\x01h\x00\x85R" * 100, "repeats its values"),
    "strings": (
        b"X\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x00X\x05\x00\x00\x00utf-8q\x01c_codecs\nencode\nq\x02"
        + b"h\x02h\x00h\x01\x86R" * 100,
        "repeats its values",
    ),
    "unknown": (b"\x8c\x01a", "has an instruction that torch.save does not write: SHORT_BINUNICODE"),
    "nothing": (b"h\x05", "cannot be read as a checkpoint, it may be damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("instructions", "said"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instructions_that_take_more_than_their_bytes_are_not_carried_out(tmp_path, instructions, said, monkeypatch):
    _written(tmp_path / "a.ckpt", {"state_dict": {}}, b"\x80\x02" + instructions + b".")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("they were carried out"))
    with pytest.raises(ValueError, match=f"a.ckpt {said}"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_all_that_torch_writes_for_tensors_and_plain_values_is_read(tmp_path):
    kept = {
        "numbers": [1, -1, 2**40, 2**70, 1.5, 1j, True, None],
        "containers": ({"a", 1}, OrderedDict(a=1), Counter("aab"), (), [[[]]], {(1, (2, 3)): 4}),
        "words": ["é", b"bytes", b"bytes" * 100, "x" * 1000],
        "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2]), torch.strided],
        "tensors": [torch.ones(2, dtype=t) for t in (torch.bool, torch.uint16, torch.bfloat16, torch.float8_e4m3fn)],
        "mask": torch.ones(1).expand(100, 100),
        "layer": nn.BatchNorm1d(3).state_dict(),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    same = torch.ones(1000, 1000)
    torch.save({"state_dict": {"a": same, "b": same}, **kept}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found["state_dict"]["b"], same)
    assert all(found[k] == kept[k] for k in ("numbers", "containers", "words", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(found["tensors"], kept["tensors"], strict=True))


def test_what_the_user_allows_is_opened(tmp_path):
    torch.save({"state_dict": {}, "more": bytearray(10)}, tmp_path / "a.ckpt")
    with torch.serialization.safe_globals([bytearray]):
        assert read_checkpoint(tmp_path / "a.ckpt")["more"] == bytearray(10)
