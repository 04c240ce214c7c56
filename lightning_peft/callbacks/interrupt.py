"""Ctrl-C saves, and says how to go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_peft.analysis.called import program

NAME = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Writes a checkpoint when the run is interrupted, and prints the command that resumes it.

    Args:
        dirpath: the folder for ``interrupted.ckpt``.
        words: what the program was called with to make this run; None takes the words of the running program, which
            are not those of one run where it makes several.
    """

    def __init__(self, dirpath: str, words: Sequence[str] | None = None) -> None:
        self.dirpath = Path(dirpath)
        self.words = words

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        path = self.dirpath / NAME
        trainer.save_checkpoint(path)
        bar = trainer.progress_bar_callback
        if bar is not None:  # while it is drawn, what is printed is wrapped and lies between its pieces
            bar.on_exception(trainer, pl_module, exception)
        rank_zero_only(self._say_how_to_go_on)(path)

    def _say_how_to_go_on(self, path: Path) -> None:
        words = sys.argv[1:] if self.words is None else self.words
        kept = [w for w in words if not w.startswith(("ckpt_path=", "hydra."))]
        command = f"{program()} {shlex.join([*kept, f'ckpt_path={path}'])}"
        print(f"\nInterrupted; the state of the run is saved in {path}\nGo on with:  {command}", flush=True)
