"""Checkpoint files are complete or absent, and the last one is found, whatever happens to disks, folders and clocks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PeftCallback, last_checkpoint
from lightning_peft.callbacks.checkpoint_files import WholeFiles, keep_files_whole

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:.*callbacks used to create the checkpoint need to be provided"
)


class Net(L.LightningModule):
    """One layer; what is done to the world after so many steps."""

    def __init__(self, after: int = -1, event=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.after, self.event = after, event

    def training_step(self, batch, batch_idx):
        if self.global_step == self.after:
            self.event()
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def data():
    return DataLoader(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), batch_size=2)


def _last(folder, **options):
    return ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False, **options)


def _fit(trainer, net, data, *callbacks, ckpt_path=None, **options):
    t = trainer(PeftCallback(LoRA(r=2), model="layer"), *callbacks, enable_checkpointing=True, max_epochs=1, **options)
    t.fit(net, data, ckpt_path=ckpt_path, weights_only=True)
    return t


def _steps(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_a_checkpoint_is_written_beside_its_place_and_not_over_the_one_before(trainer, data, tmp_path, monkeypatch):
    """Where the system's temporary files are on another disk, a move from there is a copy, over the former one."""

    def nowhere(*args, **kwargs):
        raise AssertionError("a file was made in the system's folder for temporary files")

    seen = []
    rename = Path.replace
    monkeypatch.setattr(tempfile, "mkstemp", nowhere)
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append((Path(a), Path(b))), rename(a, b))[1])
    _fit(trainer, Net(), data, _last(tmp_path / "c"))
    assert {a.parent for a, _ in seen} == {b.parent for _, b in seen} == {tmp_path / "c"}
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["last.ckpt"]


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    """At every moment the file is the old one or the new one; what is left beside it is used again."""
    path, files = tmp_path / "last.ckpt", WholeFiles()
    files.save_checkpoint({"state_dict": {}, "global_step": 1, "loops": {}}, path)
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # when it is written and not renamed
        files.save_checkpoint({"state_dict": {}, "global_step": 2, "loops": {}}, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert last_checkpoint(tmp_path) == path
    assert _steps(path) == 1
    files.save_checkpoint({"state_dict": {}, "global_step": 3, "loops": {}}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_of_shards_is_found_when_it_is_whole_and_other_strategies_say_who_reads_it(trainer, data, tmp_path):
    WholeFiles().save_checkpoint({"state_dict": {}, "global_step": 1, "loops": {}}, tmp_path / "a.ckpt")
    for name, step in (("b.ckpt", 2), ("c.ckpt", 3)):
        (tmp_path / name).mkdir()
        torch.save({"global_step": step, "loops": {}}, tmp_path / name / "meta.pt")
    (tmp_path / "c.ckpt" / "meta.pt").write_bytes(b"cut short")
    (tmp_path / "d.ckpt").mkdir()  # of which nothing but shards was written yet
    with pytest.warns(UserWarning, match=r"c.ckpt is a folder, and no whole .*d.ckpt .*b.ckpt is the last"):
        assert last_checkpoint(tmp_path) == tmp_path / "b.ckpt"
    with pytest.raises(ValueError, match=r"b.ckpt is a checkpoint of shards, which ModelParallelStrategy"):
        _fit(trainer, Net(), data, ckpt_path=tmp_path / "b.ckpt")


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_the_last_checkpoint(trainer, data, tmp_path):
    """A limit on the size of files stands in for a disk that takes no more bytes: the kernel refuses the write."""
    limits, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))

    try:
        with pytest.raises(OSError, match=r"last.ckpt could not be written: File too large \(it takes .* is whole: "):
            _fit(trainer, Net(3, fill), data, _last(tmp_path / "c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["last.ckpt"]
    whole, again = Net(), Net()
    _fit(trainer, whole, data)
    assert _steps(last_checkpoint(tmp_path / "c")) == 3
    with pytest.warns(UserWarning, match="goes on in the middle of an epoch"):
        t = _fit(trainer, again, data, _last(tmp_path / "c"), ckpt_path="last")
    assert t.global_step == 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_the_system_says_of_a_disk_is_passed_on_with_the_file_and_its_size(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    files, content = WholeFiles(), {"state_dict": {"a": torch.zeros(1000)}}
    files.save_checkpoint(content, tmp_path / "a.ckpt")
    monkeypatch.setattr(os, "fsync", refuse)
    said = rf"a.ckpt could not be written: {os.strerror(number)} \(it takes 5.\d kB, and .* are free\); the checkpoint"
    with pytest.raises(OSError, match=said) as raised:
        files.save_checkpoint(content, tmp_path / "a.ckpt")
    assert raised.value.errno == number
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.fixture
def barred():
    """A folder in which this process can write nothing; a superuser, whom permissions do not bind, is somebody else."""
    folder = Path(tempfile.mkdtemp())
    (folder / "c").mkdir()
    folder.chmod(0o755)
    (folder / "c").chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder / "c"
    os.seteuid(user)
    (folder / "c").chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_takes_no_checkpoint_is_named_before_the_first_step(trainer, data, barred):
    net = Net(0, lambda: pytest.fail("a step was made"))
    with pytest.raises(PermissionError, match=f"no checkpoint can be written into {barred}: Permission denied; choose"):
        _fit(trainer, net, data, _last(barred))


def test_a_folder_removed_in_mid_run_is_made_again(trainer, data, tmp_path):
    _fit(trainer, Net(3, lambda: shutil.rmtree(tmp_path / "c")), data, _last(tmp_path / "c"))
    assert _steps(last_checkpoint(tmp_path / "c")) == 6


@pytest.mark.parametrize("wrapped", [None, TorchCheckpointIO()], ids=["by-itself", "given"])
def test_an_asynchronous_writer_writes_whole_files_too(trainer, data, tmp_path, wrapped):
    writer = AsyncCheckpointIO(wrapped)
    _fit(trainer, Net(), data, _last(tmp_path / "c"), plugins=[writer])
    assert type(writer.checkpoint_io) is WholeFiles
    assert _steps(last_checkpoint(tmp_path / "c")) == 6


def test_a_checkpoint_io_of_the_users_is_left_alone(trainer):
    class Own(TorchCheckpointIO):
        pass

    t = trainer(plugins=[Own()])
    keep_files_whole(t)
    assert type(t.strategy.checkpoint_io) is Own


def test_the_last_checkpoint_is_that_of_the_most_steps_whatever_dates_and_damage_say(trainer, data, tmp_path):
    folder = tmp_path / "c"
    _fit(trainer, Net(), data, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    names = [f"step={step}.ckpt" for step in range(1, 7)]
    assert sorted(p.name for p in folder.iterdir()) == names
    for age, name in enumerate(names):  # a clock that ran backwards
        os.utime(folder / name, (4e9 - age * 1e5,) * 2)
    assert last_checkpoint(folder) == folder / "step=6.ckpt"
    whole = (folder / "step=6.ckpt").read_bytes()
    (folder / "step=6.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "last.ckpt").symlink_to("step=7.ckpt")  # a link whose file is gone
    with pytest.warns(UserWarning, match=r"last.ckpt is no file.*step=6.ckpt \(.* cut short.*step=5.ckpt is the"):
        assert last_checkpoint(folder) == folder / "step=5.ckpt"
    (folder / "last.ckpt").unlink()
    (folder / "step=6.ckpt").unlink()
    light = torch.load(folder / "step=4.ckpt", weights_only=True) | {"global_step": 9}
    del light["loops"]
    torch.save(light, folder / "light.ckpt")  # weights alone, as save_weights_only leaves them
    assert last_checkpoint(folder) == folder / "step=5.ckpt"
    assert last_checkpoint(str(tmp_path / "none")) is None


def test_a_checkpoint_with_a_bit_that_has_changed_in_its_instructions_is_left_out(trainer, data, tmp_path):
    _fit(trainer, Net(), data, _last(tmp_path / "c"))
    whole = (tmp_path / "c" / "last.ckpt").read_bytes()
    (tmp_path / "c" / "bad.ckpt").write_bytes(whole.replace(b"OrderedDict", b"OrderedDibt", 1))
    with pytest.warns(UserWarning, match=r"bad.ckpt cannot be read .*damaged.*last.ckpt is the last one"):
        assert last_checkpoint(tmp_path / "c") == tmp_path / "c" / "last.ckpt"


class WithPath(Net):
    """Keeps among its hyperparameters what a reader of plain values does not open."""

    def __init__(self, where: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_checkpoints_that_cannot_be_opened_for_their_objects_are_an_error_and_no_new_beginning(trainer, data, tmp_path):
    _fit(trainer, Net(), data, _last(tmp_path / "c"))
    _fit(trainer, WithPath(Path("/data")), data, ModelCheckpoint(tmp_path / "c", filename="a"))
    said = r"a.ckpt holds an object of pathlib\S*Path, but .*safe_globals .* nobody can tell whether it is the last"
    with pytest.raises(ValueError, match=said):
        last_checkpoint(tmp_path / "c")
    with torch.serialization.safe_globals([type(Path())]):
        assert last_checkpoint(tmp_path / "c") is not None
    shards = tmp_path / "d" / "a.ckpt"
    shards.mkdir(parents=True)
    torch.save({"global_step": 3, "loops": {}, "hyper_parameters": {"where": Path("/data")}}, shards / "meta.pt")
    with pytest.raises(ValueError, match="nobody can tell whether it is the last"):
        last_checkpoint(tmp_path / "d")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {}, "loops": {}}, "its global_step is None"),
        ({"state_dict": {}, "loops": {}, "global_step": "7"}, "its global_step is '7'"),
        ({"state_dict": {}, "loops": {}, "global_step": True}, "its global_step is True"),
        ({"state_dict": {}, "global_step": 7}, "holds weights alone"),
        ([1], "it has no state_dict"),
    ],
    ids=["none", "text", "truth", "weights", "list"],
)
def test_a_folder_of_which_no_checkpoint_can_be_resumed_says_why_the_run_begins_anew(tmp_path, content, said):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=rf"a.ckpt .*{said}.*: none is left, so the run begins anew"):
        assert last_checkpoint(tmp_path) is None
    (tmp_path / "b.ckpt").mkdir()
    torch.save([1], tmp_path / "b.ckpt" / "meta.pt")
    with pytest.warns(UserWarning, match=r"b.ckpt is a folder, .* its meta.pt holds no dictionary.*: none is left"):
        assert last_checkpoint(tmp_path) is None


def test_a_run_resumes_from_the_last_checkpoint_though_its_link_was_lost(trainer, data, tmp_path):
    """save_last='link' takes the old link away before it makes the new one: there Lightning's 'last' starts anew."""
    folder = tmp_path / "c"
    every = ModelCheckpoint(folder, every_n_train_steps=2, save_last="link")
    _fit(trainer, Net(), data, every)
    (folder / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        t = _fit(trainer, Net(), data, ModelCheckpoint(folder, save_last="link"), ckpt_path="last")
    assert t.ckpt_path is None
    t = _fit(trainer, Net(), data, _last(folder), ckpt_path=last_checkpoint(folder))
    assert t.global_step == 6


def test_a_clock_that_jumps_changes_nothing(trainer, data, tmp_path, monkeypatch):
    steady = Net()
    _fit(trainer, steady, data)
    jumps = iter([3e9, -7e8, 4e9, -1e9] * 10_000)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    net, folder = Net(), tmp_path / "c"
    _fit(trainer, net, data, _last(folder))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), steady.parameters(), strict=True))
    assert _steps(last_checkpoint(folder)) == 6
