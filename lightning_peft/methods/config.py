"""A method as plain values and back, for checkpoints, adapter files and YAML."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import lightning_peft.methods as methods
from lightning_peft.core.method import Method
from lightning_peft.core.patterns import refuse_slow_patterns
from lightning_peft.core.problems import nearest, unknown_names

_PACKAGE = "lightning_peft"


def method_to_config(method: Method) -> dict[str, Any]:
    """The method's class and options as a plain dictionary.

    Args:
        method: the method.

    Returns:
        ``{"_target_": "lightning_peft.LoRA", "r": 8, ...}``
    """
    return {"_target_": f"{_PACKAGE}.{type(method).__name__}", **asdict(method)}  # type: ignore[call-overload]


def method_from_config(config: dict[str, Any]) -> Method:
    """The method that a dictionary stands for.

    Args:
        config: as `method_to_config` gives it; only methods of this package are made, whatever it names.

    Returns:
        The method, checked.

    Raises:
        ValueError: if the method or an option of it is unknown, a value out of range, or a pattern may take
            too long to match.
    """
    options = dict(config)
    target = str(options.pop("_target_", ""))
    package, _, name = target.rpartition(".")
    if package != _PACKAGE or name not in methods.__all__:
        raise ValueError(f"method {target!r} is unknown{nearest(name, methods.__all__)}")
    cls: Any = getattr(methods, name)
    known = [f.name for f in fields(cls)]
    unknown = [o for o in options if o not in known]
    if unknown:
        raise ValueError(f"{name} has no option {unknown_names(unknown, known)}")
    refuse_slow_patterns(options)
    made: Method = cls(**options)
    return made
