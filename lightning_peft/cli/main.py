"""The ``lightning-peft`` command: which command was meant, and its configuration."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_peft.core.problems import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_PATH = "pkg://lightning_peft.conf"


def main() -> None:
    """Runs ``lightning-peft [train|eval|predict|export] group=choice option=value ...``."""
    import hydra

    from lightning_peft.cli import commands
    from lightning_peft.cli.overrides import problem_with

    known: dict[str, Callable[[DictConfig], Any]] = {
        "train": commands.train,
        "eval": commands.evaluate,
        "predict": commands.predict,
        "export": commands.export,
    }
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and _is_word(arguments[0]) else "train"
    if command not in known:
        _stop(f"command {command!r} is unknown{nearest(command, known)}")
    problem = problem_with(command, [a for a in arguments if not a.startswith("-")], asks=_only_asks(arguments))
    if problem is not None:
        _stop(problem)
    # torch and Lightning disagree about a private class; the other two are no news for small data
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    program = sys.argv[0]
    # argparse takes flags before the overrides only; people write them anywhere
    sys.argv = [program, *sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))]
    run = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=command)(_plain_errors(known[command]))
    run()


def _is_word(argument: str) -> bool:
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


def _only_asks(arguments: list[str]) -> bool:
    asking = ("-h", "--help", "--hydra-help", "--version", "-i", "--info", "-c", "--cfg")
    return any(a in asking or a.startswith(("--cfg=", "--info=")) for a in arguments)


def _plain_errors(run: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Shows a user's mistake as one sentence; ``HYDRA_FULL_ERROR=1`` shows where it was found."""
    from hydra.errors import InstantiationException

    def job(config: DictConfig) -> Any:
        try:
            return run(config)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, InstantiationException) as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            cause = error.__cause__ if isinstance(error, InstantiationException) else None
            _stop(f"{cause or error}\n(HYDRA_FULL_ERROR=1 shows where)")

    return job


def _stop(message: str) -> None:
    print(f"lightning-peft: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
