"""The command in a process of its own, forked from one in which all is imported: that takes longer than most runs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning_peft.cli.main as program

COMMAND = [sys.executable, "-m", program.__name__]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["lightning_peft.cli.commands", "transformers", "peft", "matplotlib.pyplot", "sklearn"]
)


def run(*words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end.

    Args:
        words: what follows its name.
        cwd: where it runs.
        check: whether it must succeed.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = _processes.Process(target=_run, args=(words, cwd, dict(os.environ), *said))
        process.start()
        process.join()
        done = subprocess.CompletedProcess([*COMMAND, *words], process.exitcode, *(path.read_text() for path in said))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _run(words: tuple[str, ...], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [program.__file__, *words]
    program.main()
