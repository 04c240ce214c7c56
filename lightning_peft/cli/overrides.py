"""What the words of a command line mean, and what is wrong with them, before anything runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning_peft.core.problems import nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_NOTHING = object()
_OPEN = ("method.config",)  # entries by the names of another package, beside those that its file has
# Lightning takes a number, a list and "auto"; what a rate may be is said where it is used; a start of weights is true
# or has a name
_WORDS_TOO = ("trainer.devices", "optimizer.lr", "method.init_lora_weights", "method.init_weights")

Options = dict[str, Any]
Compose = Callable[..., Options]


def understood(command: str, overrides: list[str], *, asks: bool = False) -> list[str]:
    """Composes the configuration, each value of a sweep by itself, and returns the overrides as Hydra wants them.

    Hydra refuses names that no file has, and wants ``++`` before them. A dictionary that is empty in its file has no
    names of its own, so any may be given like other options: ``generation.max_new_tokens=4``.

    Args:
        command: the command, which is the name of its configuration.
        overrides: the overrides as given.
        asks: whether help or the configuration itself is asked for, so mandatory values may be missing.

    Returns:
        The same overrides, with ``++`` before entries of free-form dictionaries.

    Raises:
        ValueError: if something fails, in a sentence, with the nearest right name.
    """
    from hydra.errors import HydraException

    with _composing(command) as compose:
        try:
            said = _with_entries_added(_parse(overrides), compose)
            words = _parse(said)
        except HydraException as error:
            raise ValueError(_first_line(error)) from None
        for chosen in _alternatives(words):
            try:
                wrong = _problem_of(command, words, chosen, compose, asks)
            except HydraException as error:
                wrong = _in_a_sentence(str(error), words, chosen, compose)
            if wrong is not None:
                raise ValueError(wrong)
    return said


@contextmanager
def _composing(command: str) -> Iterator[Compose]:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    @functools.cache
    def composed(*words: str) -> Options:
        # plain values: what an interpolation gives is known in a run only
        made = OmegaConf.to_container(compose(command, list(words), return_hydra_config=True))
        assert isinstance(made, dict)
        return cast(Options, made)

    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        yield composed


def _parse(overrides: list[str]) -> list[Override]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # the loader is asked for what a glob stands for
    loader = GlobalHydra.instance().config_loader()
    return list(OverridesParser.create(config_loader=loader).parse_overrides(overrides))


def _alternatives(words: list[Override]) -> Iterator[list[str]]:
    """The first value of each swept override, then each of the others in its place.

    What a sweeper draws from an interval is not looked at.
    """
    swept = [[f"{w.get_key_element()}={v}" for v in w.sweep_string_iterator()] for w in words if w.is_discrete_sweep()]
    first = [values[0] for values in swept if values]
    yield first
    for place, values in enumerate(v for v in swept if v):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


def _plain(words: list[Override]) -> list[str]:
    return [str(w.input_line) for w in words if not w.is_sweep_override()]


def _choices(words: list[str]) -> list[str]:
    """Those that choose a group's file, as ``method=lora`` does."""
    return [w for w in words if "." not in w.partition("=")[0] and "={" not in w]


def _with_entries_added(words: list[Override], compose: Compose) -> list[str]:
    from hydra.errors import HydraException

    lines = [str(w.input_line) for w in words]
    usual = {
        str(w.input_line): w.key_or_group
        for w in words
        if ("." in w.key_or_group or isinstance(w.value(), dict)) and str(w.input_line)[0] not in "+~"
    }
    if not usual:
        return lines
    try:
        start = compose(*_choices(_plain(words)))
        bases = [compose(*_choices([*_plain(words), *chosen])) for chosen in _alternatives(words)]
    except HydraException:  # a group or a choice that does not exist, which is the problem to speak of
        return lines

    def has_to_be_added(key: str) -> bool:
        # Hydra composes a sweep without its swept groups first, where their options may not exist
        swept = not _exists(start, key) and all(_exists(base, key) for base in bases)
        return swept or all(_is_free(base, key) for base in bases)

    return [f"++{line}" if line in usual and has_to_be_added(usual[line]) else line for line in lines]


def _value(options: Options, key: str) -> Any:
    """What stands at a dotted name; ``_NOTHING`` if there is no such name."""
    node: Any = options
    for part in key.split("."):
        node = node.get(part, _NOTHING) if isinstance(node, dict) else _NOTHING
    return node


def _exists(options: Options, key: str) -> bool:
    return _value(options, key) is not _NOTHING


def _groups(options: Options) -> dict[str, str]:
    """The chosen file of each group."""
    choices: dict[str, str] = options["hydra"]["runtime"]["choices"]
    return choices


def _is_free(options: Options, key: str) -> bool:
    """Whether a name is, or lies in, a dictionary that takes any entry: its file leaves it empty, or it is `_OPEN`.

    A group without options is none.
    """
    parts = key.split(".")
    places = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    values = {place: _value(options, place) for place in places if place not in _groups(options)}
    return any(value == {} or (isinstance(value, dict) and place in _OPEN) for place, value in values.items())


def _problem_of(command: str, words: list[Override], chosen: list[str], compose: Compose, asks: bool) -> str | None:
    given = [*_plain(words), *chosen]
    config = compose(*given)
    drawn = {w.key_or_group for w in words if w.is_sweep_override() and not w.is_discrete_sweep()}
    missing = [m for m in _missing(config) if m not in drawn and not m.startswith("hydra.")]
    if missing and not asks:
        return f"{command} needs {missing[0]}=..." + (f" (and {', '.join(missing[1:])})" if missing[1:] else "")
    keys = [w.key_or_group for w in words if w.key_or_group not in {*drawn, *_groups(config)}]
    groups = [word for word in _choices(given) if word.lstrip("+").partition("=")[0] in _groups(config)]
    return _word_for_a_number(config, compose(*groups), keys)


def _word_for_a_number(config: Options, usual: Options, keys: list[str]) -> str | None:
    """The first of ``keys`` that has a word where the configuration usually has a number or a truth value."""
    for key in keys:
        given, before = _value(config, key), _value(usual, key)
        if isinstance(given, str) and "${" not in given and isinstance(before, int | float) and key not in _WORDS_TOO:
            kind = "true or false" if isinstance(before, bool) else f"a number like {before}"
            return f"{key} must be {kind}, but got {given!r}"
    return None


def _missing(node: Any, path: str = "") -> list[str]:
    """Dotted names of the mandatory values that nobody gave; interpolations are not looked into."""
    if not isinstance(node, dict):
        return [path] if node == "???" else []
    return [name for key, value in node.items() for name in _missing(value, f"{path}.{key}" if path else str(key))]


def _in_a_sentence(message: str, words: list[Override], chosen: list[str], compose: Compose) -> str:
    from hydra.errors import HydraException

    choice = re.search(r"Could not find '(?:[^'/]*/)*([^'/]+)'.*?Available options in '([^']+)':\s*(.*)", message, re.S)
    if choice:
        wanted, group, rest = choice.groups()
        options = rest.partition("Config search path")[0]
        return f"{group}={wanted} is unknown{nearest(wanted, options.split())}"
    key = re.search(r"Could not override '([^']+)'", message)
    if key is None:
        return _first_line(message)
    choices = _choices([*_plain(words), *chosen])
    try:  # the options that there are depend on the groups that were chosen
        base = compose(*choices)
    except HydraException:
        base, choices = compose(), []
    (value, *_) = [w.value() for w in words if w.key_or_group == key.group(1)] or [None]
    return _no_such_name(key.group(1), value, base, choices)


def _no_such_name(name: str, value: Any, options: Options, choices: list[str]) -> str:
    """The sentence about the first part of a dotted name that does not exist, or about an entry of its value."""
    parts = name.split(".")
    if isinstance(value, dict):
        parts += [str(k) for k in list(value)[:1]]
    depth = next((n for n in range(len(parts)) if not _exists(options, ".".join(parts[: n + 1]))), len(parts) - 1)
    part, wrong = parts[depth], ".".join(parts[: depth + 1])
    if depth == 0:
        top = [k for k in options if k != "hydra"]
        elsewhere = [f"{group}.{part}" for group in top if _exists(options, f"{group}.{part}")]
        if elsewhere:
            return f"there is no {part!r}; did you mean {' or '.join(map(repr, elsewhere))}?"
        return f"there is no {part!r}{nearest(part, [*top, *(g for g in _groups(options) if '/' not in g)])}"
    parent = _value(options, ".".join(parts[:depth]))
    hint = nearest(part, [k for k in parent if k != "_target_"]) if isinstance(parent, dict) else ""
    group = next((c for c in choices if c.startswith(f"{parts[0]}=")), None)
    if depth == 1 and group is not None:
        return f"{group} has no option {part!r}{hint}"
    return f"there is no {wrong!r}{hint}"


def _first_line(message: object) -> str:
    return str(message).strip().splitlines()[0]
