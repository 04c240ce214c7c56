"""The ``plan`` command: what a method would train in a model, and what a step would cost, before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_peft.analysis.step_cost import StepCost, cost_of_forward, cost_of_step, operations
from lightning_peft.cli.targets import made
from lightning_peft.core.imitation import UnknownShape, imitated, inputs_for
from lightning_peft.core.method import DataDriven, Method, require_method
from lightning_peft.forecast import spoken_batch
from lightning_peft.handle import Adapter, adapt
from lightning_peft.methods.hf_peft import HFPeft
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task


def show_plan(config: DictConfig) -> None:
    """Shows what a method trains in a model and what a training step costs, from the model's configuration alone.

    Raises:
        ValueError: if the method does not fit the model, or a number is below 1.
    """
    require_sizes(config)
    method = made(config.method)
    require_method(method)
    if isinstance(method, HFPeft):
        raise ValueError(
            "HFPeft's layers are peft's own, which need a model with weights; train prints its plan before a step"
        )
    options = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    base, task, note = BaseModel.of(options["model"]), *task_for(options["task"])
    forward = None
    with imitated():
        model = base.build(task).eval()  # a method that is to look at data first runs as it is
        length = min(config.length, base.positions() or config.length)
        inputs = inputs_for(model, config.batch_size, length)
        with suppress(UnknownShape):
            forward = cost_of_forward(model, inputs)
        adapter = adapt(model, method)
        cost = None if forward is None else _cost(adapter, method, inputs, forward)
    print(adapter.plan)
    for line in [
        *_said(cost, spoken_batch(task, config.batch_size, length)),
        *([f"Counted with {note}"] if note else []),
    ]:
        print(f"  {line}")


def require_sizes(config: DictConfig) -> None:
    """Refuses a step without rows or tokens.

    Args:
        config: the command's, with ``batch_size`` and ``length``.

    Raises:
        ValueError: if one is no whole number above 0.
    """
    for option in ("batch_size", "length"):
        if not isinstance(config[option], int) or config[option] < 1:
            raise ValueError(f"{option} must be 1 or more, but got {config[option]}")


def task_for(options: dict[str, Any]) -> tuple[Task, str | None]:
    """The task; labels that only data would tell are made up.

    Args:
        options: the task's plain values.

    Returns:
        The task, and what was made up in words, None if nothing was.
    """
    for option, guess in (("labels", ["0", "1"]), ("num_labels", 1)):
        numbers = options.get("problem_type") == "regression"
        if option in options and options[option] is None and (option == "num_labels") == numbers:
            what = "one number" if numbers else "two classes"
            return task_from_config({**options, option: guess}), f"{what}, as task.{option} is not given"
    if options.get("name") == "embedding" and options.get("loss_type") is None:
        return task_from_config({**options, "loss_type": "ranking"}), "pairs, as task.loss_type is not given"
    return task_from_config(options), None


def _cost(adapter: Adapter, method: Method, inputs: dict[str, Any], forward: int) -> StepCost | None:
    try:
        return cost_of_step(adapter.model, inputs, forward)
    except ValueError:
        if isinstance(method, DataDriven):
            return None
        raise


def _said(cost: StepCost | None, batch: str) -> list[str]:
    if cost is None:
        return ["What a step costs cannot be counted: numbers of the model or the data decide it"]
    spared = round(100 * cost.share_below)
    return [
        f"Trains from {cost.first or 'the end'} on"
        + (f"; the {spared}% of the forward pass before it need no backward pass" if spared else ""),
        f"A step of {batch} takes {operations(cost.forward + cost.backward)}, "
        f"{100 * cost.of_full:.0f}% of what training all weights takes",
    ]
