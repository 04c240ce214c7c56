"""Ctrl-C, SIGTERM and SLURM's signal to requeue: the step is finished, the run is saved, and how to go on is said."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_peft.analysis.called import program, quoted
from lightning_peft.callbacks.checkpoint_files import refuse_unwritable

NAME = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Writes a checkpoint when the run is interrupted, and prints the command that resumes it.

    The step that is being made is finished first: parameters of which some are updated would be no state to go on
    from. A second Ctrl-C ends the run at once, without saving. SIGTERM, which a cluster sends some time before it
    kills, is heard in the same way by Lightning; the process ends with 128 + the signal's number, as a shell expects.
    On SLURM with Lightning's requeueing (``#SBATCH --signal=SIGUSR1@90``) the checkpoint is the one by which Lightning
    resumes the requeued job.

    Args:
        dirpath: the folder for ``interrupted.ckpt``.
        words: what the program was called with to make this run; None takes the words of the running program, which
            are not those of one run where it makes several.

    Raises:
        OSError: before the first step, if no file can be made in the folder.
    """

    def __init__(self, dirpath: str, words: Sequence[str] | None = None) -> None:
        self.dirpath = Path(dirpath)
        self.words = words
        self._process = 0
        self._heard: int | None = None
        self._requeues = False
        self._before: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_only(refuse_unwritable)(self.dirpath)
        self._process, self._heard, self._requeues = os.getpid(), None, False
        if threading.current_thread() is not threading.main_thread():
            return
        connector: Any = trainer._signal_connector

        def hear(number: int, frame: FrameType | None) -> None:
            if os.getpid() != self._process:  # a worker of the data, which goes on for the step
                return
            if self._heard is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            if self._heard is None and number == signal.SIGINT:
                self._say("\nCtrl-C: this step is finished and the run saved; once more ends it at once, unsaved")
            self._heard = number
            if trainer.world_size == 1:
                connector.received_sigterm = True  # by which Lightning stops where a run can be resumed

        # one that ignores it, or has a handler of the user's, keeps that
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._replace(signal.SIGINT, hear)
        if trainer.world_size > 1:
            # Lightning would have the ranks talk in the middle of whatever they are saying to each other
            self._replace(signal.SIGTERM, hear)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # Lightning would save in the middle of whatever is being done
            self._requeues = True
            self._replace(environment.requeue_signal or signal.SIGUSR1, hear)

    def _replace(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _restore(self) -> None:
        while self._before and threading.current_thread() is threading.main_thread():
            signal.signal(*self._before.popitem())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Has all ranks stop after the same batch."""
        if trainer.world_size > 1:
            heard = torch.tensor(float(self._heard or 0), device=trainer.strategy.root_device)
            self._heard = int(trainer.strategy.reduce(heard, reduce_op="max")) or None
            if self._heard is not None:
                connector: Any = trainer._signal_connector
                connector.received_sigterm = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        heard = self._heard
        self._restore()
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        if trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        if isinstance(exception, KeyboardInterrupt) and heard is not None:
            self._say("\nStopped at once; what was saved before is whole")
            return
        if isinstance(exception, SIGTERMException):
            heard = signal.SIGTERM if heard is None else heard
            exception.code = 128 + heard
        if self._requeues and heard not in (signal.SIGINT, signal.SIGTERM):
            connector: Any = trainer._signal_connector
            connector._slurm_sigusr_handler_fn(heard, None)
            return
        path = self.dirpath / NAME
        try:
            trainer.save_checkpoint(path)
        except KeyboardInterrupt:  # once more, while it is being written
            self._say("\nStopped at once; what was saved before is whole")
            return
        bar = trainer.progress_bar_callback
        if bar is not None:  # while it is drawn, what is printed is wrapped and lies between its pieces
            bar.on_exception(trainer, pl_module, exception)
        self._say_how_to_go_on(path)

    def _say_how_to_go_on(self, path: Path) -> None:
        words = sys.argv[1:] if self.words is None else self.words
        kept = [w for w in words if not w.startswith(("ckpt_path=", "hydra."))]
        if any(w.startswith("+sweep=") for w in kept):
            kept.append("hydra.mode=RUN")  # this run alone
        if any(w.startswith("search.trial=") for w in kept):
            kept.append("callbacks.pruning=null")  # its trial is over
        where = [f"ckpt_path={path}"]
        if self.words is not None and self.dirpath.name == "checkpoints":
            # in the same folder, where its logs and what its callbacks keep lie; a sweep finds it finished there
            folder = str(self.dirpath.parent)
            plain = re.fullmatch(r"[\w./:-]+", folder)
            where = [f"hydra.run.dir={folder if plain else quoted(folder)}", "ckpt_path=last"]
        way = f"{program()} {shlex.join([*kept, *where])}"
        if self.words is None and _is_a_script_of_ones_own():
            way = f"trainer.fit(..., ckpt_path={str(path)!r}, weights_only=True)"
        self._say(f"\nInterrupted; the state of the run is saved in {path}\nGo on with:  {way}")

    @staticmethod
    @rank_zero_only
    def _say(words: str) -> None:
        print(words, flush=True)


def _is_a_script_of_ones_own() -> bool:
    """Whether what runs is no command of this package, which alone knows the word ``ckpt_path=``."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv[0].endswith(".py") and (main is None or not main.name.startswith("lightning_peft"))
