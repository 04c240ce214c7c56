"""What LoRA's options say of the modules that they name."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from torch.nn import Linear, Module

from lightning_peft.core.matching import class_of, is_conv1d
from lightning_peft.core.problems import an, nearest


def names(pattern: str, name: str) -> bool:
    """Whether a pattern of ranks or strengths means a module: its whole name, or what follows a dot in it."""
    return _compiled(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=2**15)  # re itself keeps 512, and a model may have a pattern for each of its modules
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def own_value(patterns: dict[str, Any], name: str, default: float) -> float:
    """What the first pattern that means a module gives it.

    Args:
        patterns: values by pattern.
        name: the module's name.
        default: for modules that no pattern means.
    """
    if not patterns:
        return default
    return next((value for pattern, value in patterns.items() if names(pattern, name)), default)


def refuse_idle_patterns(options: dict[str, dict[str, Any]], targets: Sequence[str]) -> None:
    """Refuses a pattern that means none of the targets.

    Args:
        options: the patterns by option.
        targets: names of what gets a layer.

    Raises:
        ValueError: if there is one.
    """
    for option, patterns in options.items():
        idle = [p for p in patterns if not any(names(p, n) for n in targets)]
        if idle:
            raise ValueError(f"{option}: {idle[0]!r} names none of the target modules{nearest(idle[0], targets)}")


def refuse_beyond_linear(model: Module, targets: Sequence[str], asked: Sequence[str]) -> None:
    """Refuses options that work on linear layers alone where another kind of module is a target.

    Args:
        model: the root.
        targets: names of the modules that get a layer.
        asked: those options, as they were given.

    Raises:
        ValueError: if there is such a target.
    """
    for name in targets if asked else ():
        module = model.get_submodule(name)
        if not (isinstance(module, Linear) or is_conv1d(module)):
            raise ValueError(
                f"LoRA: {asked[0]} is for Linear and Conv1D, but {name!r} is {an(class_of(module).__name__)}; "
                "exclude it"
            )


def b_bias_problems(bias: str, *, use_dora: bool) -> list[str]:
    """What does not go together with ``lora_bias=True``, a sentence each.

    Args:
        bias: which biases of the base train.
        use_dora: whether the lengths of the weight's rows train too.
    """
    problems = []
    if bias != "none":
        problems.append("lora_bias=True and bias other than 'none' would train two biases for one")
    if use_dora:
        problems.append("lora_bias=True has no meaning with use_dora=True, whose lengths would scale that bias too")
    return problems


def biases_to_train(model: Module, targets: Sequence[str], bias: str) -> list[str]:
    """Names of the base's biases that train beside the layers.

    Args:
        model: the root.
        targets: names of the modules that get a layer.
        bias: ``"none"``, ``"lora_only"`` (of the targets) or ``"all"``.
    """
    if bias == "none":
        return []
    biases = [n for n, _ in model.named_parameters() if n.rpartition(".")[2].endswith("bias")]
    if bias == "all":
        return biases
    return [n for n in biases if any(n.startswith(f"{name}.") for name in targets)]
