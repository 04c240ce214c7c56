"""How the running program was called, so that the commands it prints can be pasted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """The start of a command that runs this program again.

    Returns:
        Such as ``lightning-peft``, ``.venv/bin/lightning-peft`` where the shell would not find it by its name, or
        ``python train.py``.
    """
    given = sys.argv[0]
    if not given.endswith(".py"):
        return shlex.quote(_as_a_shell_finds_it(given))
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # in a process that a launcher started, the main module is the launcher's
    script = ["-m", spec.name] if spec is not None and spec.origin == given else [given]
    return shlex.join([_as_a_shell_finds_it(sys.executable), *script])


def _as_a_shell_finds_it(path: str) -> str:
    name = Path(path).name
    found = shutil.which(name)
    # not by what links lead to: the interpreter of an environment is a link to one that lacks its packages
    same = found is not None and os.path.abspath(found) == os.path.abspath(path)
    return name if same else path


def quoted(word: str) -> str:
    """A word as Hydra reads it whatever characters it has: paths may hold spaces, commas and brackets.

    Args:
        word: the word.
    """
    # a backslash is one by itself, but before a quote it is the quote's
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + (m[2] and f"\\{m[2]}"), word)
    return f'"{escaped}"'
