"""The ``lightning-peft`` command: which command was meant, and its configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.bare_words import BareWords, is_word
from lightning_peft.core.problems import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_PATH = "pkg://lightning_peft.conf"
BARE_WORDS = {
    "compare": BareWords(("folders",), several=True),
    "diff": BareWords(("a", "b")),
    "doctor": BareWords(("run",)),
    **dict.fromkeys(("eval", "predict", "export", "inspect", "shrink"), BareWords(("adapter",))),
}
_WITH_A_VALUE = (
    "-c",
    "--cfg",
    "-p",
    "--package",
    "-cd",
    "--config-dir",
    "-i",
    "--info",
)  # and their value is no override


def main() -> None:
    """Runs ``lightning-peft [command] group=choice option=value ...``; train if no command is named.

    The commands: train, plan, forecast, compare, data, eval, predict, export, doctor, inspect, diff, shrink.
    """
    import hydra

    from lightning_peft.cli import commands
    from lightning_peft.cli.compare import compare
    from lightning_peft.cli.diff import show_difference
    from lightning_peft.cli.doctor import show_findings
    from lightning_peft.cli.forecast import show_forecast
    from lightning_peft.cli.inspected import show_inspection
    from lightning_peft.cli.jobs import Jobs, report, stop
    from lightning_peft.cli.overrides import understood
    from lightning_peft.cli.plan import show_plan
    from lightning_peft.cli.shrink import show_shrink

    known: dict[str, Callable[[DictConfig], Any]] = {
        "train": commands.train,
        "plan": show_plan,
        "forecast": show_forecast,
        "compare": compare,
        "data": commands.show_data,
        "eval": commands.evaluate,
        "predict": commands.predict,
        "export": commands.export,
        "doctor": show_findings,
        "inspect": show_inspection,
        "diff": show_difference,
        "shrink": show_shrink,
    }
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and is_word(arguments[0]) else "train"
    if command not in known:
        stop(f"command {command!r} is unknown{nearest(command, known)}")
    flags, overrides = _split(arguments)
    if command in BARE_WORDS:
        try:
            overrides = BARE_WORDS[command].as_overrides(overrides)
        except ValueError as error:
            stop(f"{command}: {error}")
    else:
        word = next(filter(is_word, overrides), None)
        if word is not None:
            stop(f"{command}: {word!r} is no option: what is given to it is written option=value")
    try:
        overrides = understood(command, overrides, asks=_only_asks(arguments))
    except ValueError as error:
        stop(str(error))
    program = sys.argv[0]
    # argparse takes flags before the overrides only; people write them anywhere
    flags.sort(key=lambda a: a not in ("-m", "--multirun"))
    sys.argv = [program, *flags, *overrides]
    jobs = Jobs(known[command], arguments)
    # Hydra asks its task function for the file that it stands in, which an object does not have
    run = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=command)(lambda config: jobs(config))
    try:
        run()
    finally:
        failed = report()
    if failed:
        sys.exit(2)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        (flags if argument.startswith("-") or before in _WITH_A_VALUE else overrides).append(argument)
    return flags, overrides


def _only_asks(arguments: list[str]) -> bool:
    asking = ("-h", "--help", "--hydra-help", "--version", "-i", "--info", "-c", "--cfg")
    return any(a in asking or a.startswith(("--cfg=", "--info=")) for a in arguments)


if __name__ == "__main__":
    main()
