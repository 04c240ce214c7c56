"""Optimizers and schedules by name, as a configuration gives them."""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_peft.core.problems import nearest
from lightning_peft.methods.lora_plus import lora_plus_groups

AUTO = "auto"
"""For ``lr``: Lightning's learning-rate finder looks for it before the first step."""
OPTIMIZER = {"name": "AdamW", "lr": None, "weight_decay": 0.0}
SCHEDULER = {"name": "linear", "warmup": 0.06}


def check_optimization(optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Refuses names and numbers that would fail when training begins.

    Args:
        optimizer: the name of a class of ``torch.optim`` or ``bitsandbytes.optim``, and its options.
        scheduler: the name of one of transformers' schedules, and ``warmup``.

    Raises:
        ValueError: if a name is unknown or a number is out of its range.
    """
    _optimizer(optimizer["name"])
    rate: Any = optimizer.get("lr")
    if not (rate is None or rate == AUTO or _is_number(rate)):
        raise ValueError(
            f"optimizer.lr must be a number, auto (which searches for one) or null (the method's own), but got {rate!r}"
        )
    if _is_number(rate) and not 0 < rate < math.inf:
        raise ValueError(f"optimizer.lr must be above 0, but got {rate}")
    ratio = optimizer.get("loraplus_lr_ratio")
    if ratio is not None and ratio < 1:
        raise ValueError(f"optimizer.loraplus_lr_ratio must be 1 or more, but got {ratio}")
    from transformers import SchedulerType

    schedules = [s.value for s in SchedulerType]
    if scheduler["name"] not in schedules:
        raise ValueError(f"scheduler {scheduler['name']!r} is unknown{nearest(scheduler['name'], schedules)}")
    if not 0 <= scheduler["warmup"] < 1:
        raise ValueError(f"scheduler.warmup must be at least 0 and below 1, but got {scheduler['warmup']}")


def make_optimizer(model: Module, config: dict[str, Any], learning_rate: float) -> Optimizer:
    """The optimizer for all that trains.

    Args:
        model: what holds the parameters.
        config: the name of a class of ``torch.optim`` or ``bitsandbytes.optim``, and its options;
            ``loraplus_lr_ratio`` makes B of LoRA learn so many times as fast.
        learning_rate: taken where the options have none, or one that is still to be found.
    """
    options = {k: v for k, v in config.items() if k not in ("name", "loraplus_lr_ratio")}
    if options.get("lr") in (None, AUTO):
        options["lr"] = learning_rate
    ratio = config.get("loraplus_lr_ratio")
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    if ratio is not None:
        trained = lora_plus_groups(model, options["lr"], ratio)
    made: Optimizer = _optimizer(config["name"])(trained, **options)
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _optimizer(name: str) -> Any:
    """An optimizer's class: PyTorch's, or where that has none of the name bitsandbytes', such as ``AdamW8bit``."""
    known = _classes(torch.optim)
    if name not in known and importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        known = {**_classes(bitsandbytes.optim), **known}
    if name not in known:
        missing = name.endswith("bit") and importlib.util.find_spec("bitsandbytes") is None
        package = "; those with fewer bits need bitsandbytes: pip install 'lightning-peft[quantization]'"
        raise ValueError(f"optimizer {name!r} is unknown{package if missing else nearest(name, known)}")
    return known[name]


def _classes(module: ModuleType) -> dict[str, Any]:
    found = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Optimizer)}
    found.pop("Optimizer", None)
    return found


def make_schedule(optimizer: Optimizer, config: dict[str, Any], steps: float) -> Any:
    """The schedule of the rate, a step at a time.

    Args:
        optimizer: whose rate it moves.
        config: the name of one of transformers' schedules, and the share of the steps that warm up.
        steps: all optimizer steps of the run; infinite where it has no end.

    Raises:
        ValueError: if the schedule goes by the run's length and that has no end.
    """
    from transformers import get_scheduler

    if math.isinf(steps):
        if config["name"] != "constant" and not (config["name"] == "constant_with_warmup" and not config["warmup"]):
            raise ValueError(
                f"scheduler={config['name']} goes by the length of the training, but this one has no end; set "
                "trainer.max_epochs or trainer.max_steps, or take scheduler.name=constant"
            )
        steps = 1
    return get_scheduler(config["name"], optimizer, math.ceil(config["warmup"] * steps), int(steps))


def spoken_schedule(config: dict[str, Any]) -> str:
    """A schedule in words, for people.

    Args:
        config: the schedule's name and its ``warmup``.
    """
    warmup = f", {100 * config['warmup']:g}% warm-up" if config["warmup"] else ""
    return f"{config['name']}{warmup}"
