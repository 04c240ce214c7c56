"""What a configuration may have made: objects of this package and of a few listed ones, whatever file says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

OWN_TARGETS = "LIGHTNING_PEFT_TARGETS"
"""The environment variable with packages of one's own, such as ``"mine,theirs.callbacks"``: no file can set it."""

_CLASSES = (
    "lightning_peft",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
_CALLABLES = ("torchvision.transforms", "PIL.ImageOps", "PIL.ImageFilter", "PIL.ImageEnhance")


def made(config: Any, **given: Any) -> Any:
    """What a configuration stands for, once every ``_target_`` in it has been seen to be one of the listed.

    Args:
        config: with ``_target_``.
        **given: options above its own.

    Raises:
        ValueError: if a target is none of the listed.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    for target in _targets(plain):
        _refuse_foreign(target)
    return instantiate(config, **given, _convert_="all")


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _targets(inner)


def _refuse_foreign(target: Any) -> None:
    own = [p.strip() for p in os.environ.get(OWN_TARGETS, "").split(",") if p.strip()]
    if isinstance(target, str) and _is_in(target, own):
        return
    if isinstance(target, str) and _is_in(target, (*_CLASSES, *_CALLABLES)):
        found = get_object(target)
        # a module's name leads on to what it has imported itself, such as os
        home = str(getattr(found, "__module__", ""))
        if _is_in(home, _CALLABLES) or (
            isinstance(found, type) and _is_in(home, ("lightning_peft", "lightning.pytorch"))
        ):
            return
    raise ValueError(
        f"_target_={target} is none of the listed: {', '.join((*_CLASSES, *_CALLABLES))}. What a configuration has made"
        f" is run; if it is yours, say so where no file can: {OWN_TARGETS}={str(target).partition('.')[0]} in the "
        "environment"
    )


def _is_in(name: str, packages: Any) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
