"""Whoever is killed while it writes a folder, at whatever moment, leaves what was there or the whole of the new."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import time

import pytest
import torch

from lightning_peft import LoRA, adapt, load_adapter
from lightning_peft.formats.merged import save_merged
from lightning_peft.formats.writing import write_json, written_whole

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "open"}
MOST = 200
SCRATCH = r"\.a\.[0-9a-f]{8}\.partial"


class Tokenizer:
    """Writes what those of transformers do, a folder below among it."""

    def save_pretrained(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "chat_templates").mkdir()
        (folder / "chat_templates" / "a.jinja").write_text("x")


def _killed(write, place, n):
    """Whether a child is killed while it writes: the n-th time that it opens, makes, renames or removes something."""
    child = os.fork()
    if child == 0:
        left = n

        def hear(event, args):
            nonlocal left
            if event in CHANGES and str(place) in str(args[0]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        try:
            write()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _at_every_moment(write, place, prepare, look):
    """What `look` finds in a folder of its own for each moment at which the writer is killed, and when it lives."""
    found = []
    for n in range(MOST):
        folder = place / str(n) / "a"
        folder.parent.mkdir()
        prepare(folder)
        dies = _killed(lambda folder=folder: write(folder), folder.parent, n)
        found.append(look(folder))
        if not dies:
            return found
    raise AssertionError(f"it opens and changes more than {MOST} files")


def _with_notes(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


PLACES = {"new": lambda folder: None, "empty": lambda folder: folder.mkdir(), "notes": _with_notes}


@pytest.mark.parametrize("prepare", PLACES.values(), ids=PLACES)
def test_an_adapters_folder_holds_none_or_a_whole_one(build, tmp_path, prepare):
    adapter, base = adapt(build("bert"), LoRA(r=2)), build("bert")
    expected = adapter.state_dict()

    def look(folder):
        if prepare is _with_notes:
            assert (folder / "notes.txt").read_text() == "mine"
        try:
            found = load_adapter(base, folder)
        except FileNotFoundError as error:
            return "none" if "holds no adapter" in str(error) else str(error)
        assert found.method == LoRA(r=2)
        assert found.state_dict().keys() == expected.keys()
        assert all(torch.equal(t, expected[k]) for k, t in found.state_dict().items())
        assert (folder / "chat_templates" / "a.jinja").exists()
        found.remove()
        return "whole"

    found = _at_every_moment(lambda folder: adapter.save(folder, Tokenizer()), tmp_path, prepare, look)
    assert found[0] == "none"
    assert found == sorted(found)  # none, and from one moment on the whole
    assert found[-1] == "whole"


def test_a_merged_model_in_an_empty_folder_is_none_or_a_whole_one(build, tmp_path, call):
    from transformers import AutoModelForCausalLM

    model = build("llama")
    adapt(model, LoRA(r=2))
    expected = call(model, "llama")

    def look(folder):
        if not (folder / "config.json").exists():  # without which transformers loads nothing
            return "none"
        torch.testing.assert_close(call(AutoModelForCausalLM.from_pretrained(folder), "llama"), expected)
        return "whole"

    found = _at_every_moment(lambda folder: save_merged(model, "default", folder), tmp_path, PLACES["empty"], look)
    assert found[0] == "none"
    assert found == sorted(found)
    assert found[-1] == "whole"


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    def prepare(folder):
        folder.mkdir()
        write_json(folder / "m.json", {"a": 1})

    found = _at_every_moment(
        lambda folder: write_json(folder / "m.json", {"a": 2}),
        tmp_path,
        prepare,
        lambda folder: json.loads((folder / "m.json").read_text())["a"],
    )
    assert set(found) == {1, 2}
    assert found == sorted(found)


def test_all_is_on_the_disk_before_anything_is_renamed(tmp_path, monkeypatch):
    """Else a machine whose power fails may have the new names and none of what is in the files."""
    flushed = set()
    flush, rename = os.fsync, os.rename

    def note(handle):
        flushed.add(os.fstat(handle).st_ino)
        flush(handle)

    seen = []
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(flushed >= _inodes(a)), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(flushed >= _inodes(a)), rename(a, b)))
    for _ in range(2):
        with written_whole(tmp_path / "a") as scratch:
            (scratch / "below").mkdir()
            (scratch / "below" / "x").write_text("x")
            (scratch / "y").write_text("y")
    write_json(tmp_path / "z.json", {})
    assert seen == [True] * 4  # the new folder, two files into it, a file
    assert flushed >= _inodes(tmp_path)


def _inodes(path):
    return {p.stat().st_ino for p in (path, *path.rglob("*"))}


def test_what_is_written_may_be_read_by_those_whom_the_user_lets_read(tmp_path):
    before = os.umask(0o077)
    try:
        with written_whole(tmp_path / "mine") as scratch:
            assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        os.umask(0o027)
        with written_whole(tmp_path / "ours"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o750


def test_what_a_killed_writer_left_goes_a_day_later_and_what_is_being_written_stays(tmp_path):
    def write():
        with written_whole(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        assert _killed(write, tmp_path, MOST)
    left = sorted(tmp_path.iterdir())
    assert [bool(re.fullmatch(SCRATCH, p.name)) for p in left] == [True, True]
    yesterday = time.time() - 25 * 3600
    os.utime(left[0], (yesterday, yesterday))
    with written_whole(tmp_path / "a"):
        pass
    assert sorted(tmp_path.iterdir()) == [left[1], tmp_path / "a"]


def test_what_goes_into_a_folder_that_exists_lies_on_its_disk_before(build, tmp_path):
    """Nobody can rename from one disk to another, or write beside a folder on which a disk is mounted."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with written_whole(tmp_path / "out") as scratch:
        assert scratch.resolve().parent == tmp_path / "disk"
    folder = adapt(build("bert"), LoRA(r=2)).save(tmp_path / "out")
    load_adapter(build("bert"), folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]
