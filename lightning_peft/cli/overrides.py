"""What is wrong with the words of a command line, before anything runs."""

from __future__ import annotations

import re
from typing import Any

from lightning_peft.core.problems import nearest

_WORDS_TOO = ("trainer.devices",)  # Lightning takes a number, a list and "auto"


def problem_with(command: str, overrides: list[str], *, asks: bool = False) -> str | None:
    """Composes the configuration, each value of a sweep by itself, and says in a sentence what fails.

    Args:
        command: the command, which is the name of its configuration.
        overrides: the overrides as given.
        asks: whether help or the configuration itself is asked for, so mandatory values may be missing.

    Returns:
        The problem with the nearest right name, or None.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        try:
            parsed = OverridesParser.create().parse_overrides(overrides)
            plain = [o.input_line for o in parsed if not o.is_sweep_override()]
            swept = [o for o in parsed if o.is_sweep_override()]
            plain_keys = [o.key_or_group for o in parsed if not o.is_sweep_override() and "." in o.key_or_group]
            choices = [str(o.input_line) for o in parsed if not o.is_sweep_override() and "." not in o.key_or_group]
            for alternatives in [
                [],
                *([[f"{o.key_or_group}={v}"] for o in swept for v in o.sweep_string_iterator()]),
            ]:
                config = compose(command, [str(p) for p in [*plain, *alternatives]])
                left_to_sweep = {o.key_or_group for o in swept}
                missing = [m for m in _missing(OmegaConf.to_container(config)) if m not in left_to_sweep]
                if missing and not asks and (alternatives or not swept):
                    return f"{command} needs {missing[0]}=..." + (
                        f" (and {', '.join(missing[1:])})" if missing[1:] else ""
                    )
                wrong = _word_for_a_number(config, compose(command, choices), plain_keys)
                if wrong is not None:
                    return wrong
        except HydraException as error:
            try:  # the options that there are depend on the groups that were chosen
                base = compose(command, [o for o in overrides if _chooses(o)])
            except HydraException:
                base = compose(command)
            assert isinstance(base, DictConfig)
            return _in_a_sentence(str(error), base)
    return None


def _chooses(override: str) -> bool:
    """Whether an override is the plain choice of one group, as ``method=lora`` is."""
    key, _, value = override.partition("=")
    return "." not in key and "," not in value


def _word_for_a_number(config: Any, usual: Any, keys: list[str]) -> str | None:
    """The first of ``keys`` that has a word where the configuration usually has a number or a truth value."""
    from omegaconf import OmegaConf

    for key in keys:
        given, before = OmegaConf.select(config, key), OmegaConf.select(usual, key)
        if isinstance(given, str) and isinstance(before, int | float) and key not in _WORDS_TOO:
            kind = "true or false" if isinstance(before, bool) else f"a number like {before}"
            return f"{key} must be {kind}, but got {given!r}"
    return None


def _missing(node: Any, path: str = "") -> list[str]:
    """Dotted names of the mandatory values that nobody gave; interpolations are not looked into."""
    if not isinstance(node, dict):
        return [path] if node == "???" else []
    return [name for key, value in node.items() for name in _missing(value, f"{path}.{key}" if path else str(key))]


def _in_a_sentence(message: str, base: Any) -> str:
    choice = re.search(r"Could not find '(?:[^'/]*/)*([^'/]+)'.*?Available options in '([^']+)':\s*(.*)", message, re.S)
    if choice:
        wanted, group, rest = choice.groups()
        options = rest.partition("Config search path")[0]
        return f"{group}={wanted} is unknown{nearest(wanted, options.split())}"
    key = re.search(r"Could not override '([^']+)'", message)
    if key:
        parent, _, name = key.group(1).rpartition(".")
        from omegaconf import OmegaConf

        node = OmegaConf.select(base, parent) if parent else base
        known = list(node) if node is not None else list(base)
        above = OmegaConf.select(base, parent.rpartition(".")[0]) if "." in parent else None
        if node is not None and "_target_" not in node and above is not None and "_target_" in above:
            # an option that is itself a dictionary, whose keys are the user's own
            return f"{parent} holds no {name!r} yet{nearest(name, known)}; to add it, write +{key.group(1)}=..."
        return f"there is no {key.group(1)!r}{nearest(name, [k for k in known if k != '_target_'])}"
    return message.strip().splitlines()[0]
