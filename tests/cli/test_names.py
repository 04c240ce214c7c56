"""The command's files stand on the path where main.py is run as a file, as Lightning starts further processes."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning_peft.cli


def test_no_file_of_the_command_hides_a_module_of_python():
    names = {path.stem for path in Path(lightning_peft.cli.__file__).parent.glob("*.py")}
    assert not names & sys.stdlib_module_names
