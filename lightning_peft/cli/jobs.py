"""One run of a command: a mistake becomes a sentence, and a sweep goes on after a run that failed."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_peft.analysis.run_files import ERROR
from lightning_peft.cli.report import print_sweep
from lightning_peft.cli.sweep import Outcome, Sweep
from lightning_peft.formats.writing import written_file

_MISTAKES = (ValueError, TypeError, OSError, RuntimeError, ImportError, InstantiationException)
_FULL = "HYDRA_FULL_ERROR"
# it has no use for a run's result: what fails there is ours to count
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper."


@dataclass
class Jobs:
    """Runs a command as Hydra's task function, once or once for each run of a sweep.

    Args:
        command: what to run.
        given: the words of the command line; what a run has besides them is what the sweep chose for it.
        program: how this program was called, which a launcher's processes do not know.
    """

    command: Callable[[DictConfig], Any]
    given: list[str]
    program: str = field(default_factory=lambda: sys.argv[0])

    def __call__(self, config: DictConfig) -> Any:
        """Runs the command; a sweeper other than Hydra's basic one gets the error, to count it itself."""
        _ignore_what_is_no_news()
        sys.argv[0] = self.program
        sweep = Sweep()
        try:
            result = self.command(config)
        except Exception as error:
            if sweep.folder is not None:
                sweep.note(self._failed(error))
                if not str(HydraConfig.get().sweeper._target_).startswith(_BASIC_SWEEPER):
                    raise
                return None
            if os.environ.get(_FULL) or not isinstance(error, _MISTAKES):
                raise
            stop(f"{_reason(error)}\n({_FULL}=1 shows where)")
        if sweep.folder is not None:
            score = result if isinstance(result, float) else None
            # the other processes of a run on several devices have no score
            rank_zero_only(sweep.note)(self._outcome(folder=config.run_dir, monitor=config.get("monitor"), score=score))
        return result

    def _outcome(self, **came: Any) -> Outcome:
        return Outcome(int(HydraConfig.get().job.num), self._chosen(), **came)

    def _failed(self, error: Exception) -> Outcome:
        """Says at once that a run failed, and why; at the end of a long sweep that is far above."""
        reason = _reason(error)
        outcome = self._outcome(failed=reason.strip().splitlines()[0])
        if os.environ.get(_FULL) or not isinstance(error, _MISTAKES):
            traceback.print_exc()
        print(f"lightning-peft: {outcome.name} failed: {reason}", file=sys.stderr, flush=True)
        return outcome

    def _chosen(self) -> str:
        """The words that a run has besides those that were given for all."""
        # "++" is put before some words where Hydra wants it, not by who typed them
        words = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
        typed = [word for word in words if not word.startswith("search.trial=")]  # which is the run's number
        given = {word.removeprefix("++") for word in self.given}
        return " ".join([word for word in typed if word not in given] or typed)


def report() -> int:
    """Lists what the runs of a sweep reached, and those that failed.

    Returns:
        How many failed.
    """
    runs = Sweep().outcomes()
    reached = [run for run in runs if run.score is not None]
    failed = [run for run in runs if run.failed is not None]
    if len(reached) > 1:
        print_sweep(reached)
    if failed:
        lines = "".join(f"\n  {run.name}: {run.failed}" for run in failed)
        of = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        print(f"\nlightning-peft: {len(failed)} of {of} failed ({_FULL}=1 shows where):{lines}", file=sys.stderr)
    return len(failed)


def _ignore_what_is_no_news() -> None:
    # torch and Lightning disagree about a private class; the other two are no news for small data
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # a run that goes on has a folder of its own
    warnings.filterwarnings("ignore", message="The dirpath has changed from .*")


def stop(message: str) -> NoReturn:
    """Ends the command with one sentence.

    Args:
        message: the sentence.
    """
    print(f"lightning-peft: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def reason_kept(folder: Path) -> Iterator[None]:
    """A block that writes into a run's folder why it failed, for those who look there when the terminal is gone.

    Args:
        folder: the run's.
    """
    (folder / ERROR).unlink(missing_ok=True)  # of an earlier try
    try:
        yield
    except Exception as error:
        with suppress(OSError), written_file(folder / ERROR) as scratch:
            scratch.write_text(f"{_reason(error).strip()}\n", encoding="utf-8")
        raise


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, InstantiationException) else None
    shown = cause or error
    said = "\n".join([str(shown), *getattr(shown, "__notes__", ())])
    return said if said and isinstance(shown, _MISTAKES) else f"{type(shown).__name__}: {said}"
