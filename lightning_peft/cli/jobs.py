"""One run of a command: a mistake becomes a sentence, and a sweep goes on after a run that failed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_peft.cli.report import Reached, print_sweep

_MISTAKES = (ValueError, TypeError, OSError, RuntimeError, ImportError, InstantiationException)
_FULL = "HYDRA_FULL_ERROR"
# one after the other in this process, and of no use for a run's result: what fails there is ours to count
_BASIC = ("hydra._internal.core_plugins.basic_sweeper.", "hydra._internal.core_plugins.basic_launcher.")


@dataclass
class Jobs:
    """Runs a command as Hydra's task function, once or once for each run of a sweep.

    Args:
        command: what to run.
        given: the words of the command line; what a run has besides them is what the sweep chose for it.
    """

    command: Callable[[DictConfig], Any]
    given: list[str]
    done: int = 0
    failed: list[str] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)

    def __call__(self, config: DictConfig) -> Any:
        """Runs the command; a sweeper or launcher other than Hydra's basic ones gets the error, to count it itself."""
        self.done += 1
        try:
            result = self.command(config)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                self._record(error)
                if not _is_basic():
                    raise
                return None
            if os.environ.get(_FULL) or not isinstance(error, _MISTAKES):
                raise
            stop(f"{_reason(error)}\n({_FULL}=1 shows where)")
        if HydraConfig.get().mode == RunMode.MULTIRUN and isinstance(result, float):
            number, folder = int(HydraConfig.get().job.num), Path(config.run_dir)
            self.reached.append(Reached(number, self._chosen(), config.monitor, result, folder))
        return result

    def _chosen(self) -> str:
        """The words that a run has besides those that were given for all."""
        # "++" is put before some words where Hydra wants it, not by who typed them
        typed = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
        given = {word.removeprefix("++") for word in self.given}
        return " ".join([word for word in typed if word not in given] or typed)

    def _record(self, error: Exception) -> None:
        """Says at once which run failed, and keeps it for the end, where a long sweep's messages are far above."""
        number, chosen = HydraConfig.get().job.num, self._chosen()
        run = f"run {number} ({chosen})" if chosen else f"run {number}"
        reason = _reason(error)
        if os.environ.get(_FULL) or not isinstance(error, _MISTAKES):
            traceback.print_exc()
        print(f"lightning-peft: {run} failed: {reason}", file=sys.stderr, flush=True)
        self.failed.append(f"{run}: {reason.strip().splitlines()[0]}")

    def report(self) -> None:
        """Lists what the runs of a sweep reached, and those that failed."""
        if len(self.reached) > 1:
            print_sweep(self.reached)
        if self.failed:
            lines = "".join(f"\n  {line}" for line in self.failed)
            runs = f"{self.done} run{'s' if self.done > 1 else ''}"
            print(
                f"\nlightning-peft: {len(self.failed)} of {runs} failed ({_FULL}=1 shows where):{lines}",
                file=sys.stderr,
            )


def stop(message: str) -> NoReturn:
    """Ends the command with one sentence.

    Args:
        message: the sentence.
    """
    print(f"lightning-peft: {message}", file=sys.stderr)
    sys.exit(2)


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, InstantiationException) else None
    shown = cause or error
    said = "\n".join([str(shown), *getattr(shown, "__notes__", ())])
    return said if said and isinstance(shown, _MISTAKES) else f"{type(shown).__name__}: {said}"


def _is_basic() -> bool:
    chosen = HydraConfig.get()
    return all(str(part._target_).startswith(_BASIC) for part in (chosen.sweeper, chosen.launcher))
