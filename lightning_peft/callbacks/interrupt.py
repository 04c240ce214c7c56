"""Ctrl-C saves, and says how to go on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

NAME = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Writes a checkpoint when the run is interrupted, and prints the command that resumes it.

    Args:
        dirpath: the folder for ``interrupted.ckpt``.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        path = self.dirpath / NAME
        trainer.save_checkpoint(path)
        rank_zero_only(_say_how_to_go_on)(path)


def _say_how_to_go_on(path: Path) -> None:
    given = [a for a in sys.argv[1:] if not a.startswith(("ckpt_path=", "hydra."))]
    command = shlex.join(["lightning-peft", *given, f"ckpt_path={path}"])
    print(f"\nInterrupted; the state of the run is saved in {path}\nGo on with:  {command}")
