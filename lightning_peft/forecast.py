"""What a training takes, before anything is loaded: its step is run on tensors without numbers, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_peft.analysis.imitation import UnknownShape, imitated, inputs_for, numbers
from lightning_peft.analysis.step_memory import StepMemory, memory_of_step
from lightning_peft.core.method import DataDriven, Method
from lightning_peft.core.per_forward import labels_of_batch
from lightning_peft.core.problems import nearest
from lightning_peft.handle import adapt
from lightning_peft.methods.hf_peft import HFPeft
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.made_up import made_up_batch
from lightning_peft.tasks.optimization import make_optimizer
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.token_mean import TokenMean

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def imitated_step(
    base: BaseModel, task: Task, method: Method, optimizer: dict[str, Any], precision: str = "32-true"
) -> Iterator[Callable[[int, int], StepMemory]]:
    """A model without numbers, adapted as it would be trained.

    Args:
        base: the base, of which the configuration alone is read.
        task: the task; it knows its labels.
        method: the method.
        optimizer: the optimizer's name and options, as `PeftModule` takes them.
        precision: the Trainer's.

    Yields:
        What counts a step of so many rows of so many tokens, with every token supervised: no batch of as many takes
        more. Images have a size of their own.

    Raises:
        ValueError: if the precision is unknown, the base is quantized, or the step hangs on numbers: of data that the
            method looks at, of experts that tokens choose.
    """
    if precision not in PRECISIONS:
        near = nearest(precision, PRECISIONS)
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, but got {precision!r}{near}")
    if isinstance(method, HFPeft) or (isinstance(method, DataDriven) and method.needs_data):
        why = "its layers are peft's own" if isinstance(method, HFPeft) else "it looks at data first"
        raise ValueError(f"what a step of {type(method).__name__} takes cannot be counted without numbers: {why}")
    if base.quantization is not None:
        raise ValueError(
            f"what a step with quantization={base.quantization} takes cannot be counted; leave it out, and the weights "
            "that rest are the part that it makes smaller"
        )
    kind, _, way = precision.partition("-")
    with imitated():
        model: Any = base.build(task, _DTYPES[kind] if way == "true" and kind in _DTYPES else torch.float32)
        model.train()
        adapt(model, method)
        options = partial(make_optimizer, model, optimizer, method.learning_rate)
        wide = getattr(model.config, "vocab_size", None)

        def count(rows: int, tokens: int) -> StepMemory:
            with numbers():
                batch = made_up_batch(task, inputs_for(model, rows, tokens))
            mean = TokenMean()

            def loss() -> Tensor:
                with labels_of_batch.passing(batch.get("labels")), _autocast(kind, way):
                    total, units = task.loss(task.outputs(model, batch), batch)
                    return mean.scaled(total, units)

            model.zero_grad()
            try:
                return memory_of_step(model, options, loss, wide)
            except UnknownShape as error:
                raise ValueError(
                    f"what a step of {type(model).__name__} takes hangs on numbers, such as which expert a token "
                    "chooses, and cannot be counted without them"
                ) from error

        yield count


def _autocast(kind: str, way: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", _DTYPES[kind]) if way == "mixed" else nullcontext()
