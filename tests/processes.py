"""The command, or a script, in a process of its own, forked from one in which all is imported.

Importing, and reading the embedded data from its sources, takes longer than most of them run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import lightning_peft.cli.main as program

COMMAND = [sys.executable, "-m", program.__name__]

_ROOT = Path(__file__).parents[1]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.preloaded"])


def run(*words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end.

    Args:
        words: what follows its name.
        cwd: where it runs.
        check: whether it must succeed.
    """
    return _forked(None, words, cwd, check)


def run_script(script: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python file to its end, in which it must succeed.

    Args:
        script: the file.
        words: what follows its name.
        cwd: where it runs.
    """
    return _forked(script, tuple(map(str, words)), cwd, True)


def _forked(script: Path | None, words: tuple[str, ...], cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        with contextlib.chdir(_ROOT):  # the server, which starts with the first process, imports from here
            forkserver.ensure_running()
        process = _processes.Process(target=_run, args=(script, words, cwd, dict(os.environ), *said))
        process.start()
        process.join()
        command = COMMAND if script is None else [sys.executable, str(script)]
        done = subprocess.CompletedProcess([*command, *words], process.exitcode, *(path.read_text() for path in said))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _run(
    script: Path | None, words: tuple[str, ...], cwd: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [str(script or program.__file__), *words]
    if script is None:
        program.main()
    else:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
