"""What is written appears as a whole, or what was there stays."""

from __future__ import annotations

import json

import pytest

from lightning_peft import LoRA, adapt
from lightning_peft.formats.merged import save_merged
from lightning_peft.formats.writing import write_json, written_file


def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    file = tmp_path / "new" / "metrics.json"
    write_json(file, {"b": 1, "a": 2})
    assert list(json.loads(file.read_text())) == ["a", "b"]
    with pytest.raises(FileNotFoundError), written_file(file) as scratch:
        (scratch.write_text("half"), (tmp_path / "missing").read_text())
    assert json.loads(file.read_text()) == {"a": 2, "b": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 2, "b": 1}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("there", [False, True])
def test_a_merged_model_that_cannot_be_written_to_its_end_leaves_no_part_of_it(build, tmp_path, there):
    class Tokenizer:
        def save_pretrained(self, folder):
            assert (folder / "config.json").exists()
            raise OSError("disk full")

    model = build("llama")
    adapt(model, LoRA(r=2))
    folder = tmp_path / "merged"
    if there:
        folder.mkdir()
    with pytest.raises(OSError, match="disk full"):
        save_merged(model, "default", folder, Tokenizer())
    assert list(tmp_path.rglob("*")) == ([folder] if there else [])
    save_merged(model, "default", folder)
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]
