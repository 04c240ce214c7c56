"""What an error says of a file that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.core.problems import nearest_path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("runs/adaptr", "; did you mean 'runs/adapter'?"),
        ("run/adapter", "; did you mean 'runs/adapter'?"),
        ("run/adaptr", ""),
        ("runs/adapter/file.txt", ""),
        ("runs/dangling", ""),
        ("somewhere/else", ""),
        ("a" * 5000, ""),
        ("runs/adapter/file.txt/more", ""),
    ],
)
def test_the_first_part_of_a_path_that_is_missing_is_taken_for_one_like_it(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "adapter").mkdir(parents=True)
    (tmp_path / "runs" / "adapter" / "file.txt").touch()
    (tmp_path / "runs" / "dangling").symlink_to("nowhere")
    assert nearest_path(Path(given)) == said
