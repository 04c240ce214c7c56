"""What a training takes, before anything is loaded: its step is run on tensors without numbers, and counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_peft.analysis.step_memory import CountedSteps, StepMemory
from lightning_peft.core.imitation import UnknownShape, imitated, inputs_for, numbers
from lightning_peft.core.method import DataDriven, Method
from lightning_peft.core.per_forward import labels_of_batch
from lightning_peft.core.problems import nearest
from lightning_peft.handle import adapt
from lightning_peft.methods.hf_peft import HFPeft
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.dpo import DPO
from lightning_peft.tasks.embedding import Embedding
from lightning_peft.tasks.imitated_quantization import takes_4_bits
from lightning_peft.tasks.made_up import made_up_batch
from lightning_peft.tasks.optimization import make_optimizer
from lightning_peft.tasks.row_attention import text_config
from lightning_peft.tasks.task import Processed, Task
from lightning_peft.tasks.token_mean import TokenMean

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}


class ImitatedStep:
    """A training step on tensors without numbers; rows are full but for one token, and every token is supervised.

    Rows are padded: a batch that is packed takes less. Images have a size of their own. On a GPU attention is taken to
    keep what flash attention keeps, with dropout or without.

    Args:
        model: an adapted Hugging Face model without numbers.
        task: the task.
        optimizer: the optimizer.
        precision: the Trainer's.
        on_cpu: whether the step is made on a CPU, whose attention keeps matrices of all pairs where it has dropout.
    """

    def __init__(self, model: Any, task: Task, optimizer: Optimizer, precision: str, *, on_cpu: bool = False) -> None:
        self.model = model
        self.task = task
        self.precision = precision
        self.on_cpu = on_cpu
        self.steps = CountedSteps(model, optimizer, getattr(text_config(model), "vocab_size", None))

    def memory(self, rows: int, tokens: int) -> StepMemory:
        """What a step takes that is not the first.

        Args:
            rows: of the batch.
            tokens: of each row.

        Raises:
            ValueError: if that hangs on numbers, such as which expert a token chooses.
        """
        with self._without_numbers():
            return self.steps.memory(self._loss(rows, tokens))

    def operations(self, rows: int, tokens: int) -> int:
        """What a step computes in products, convolutions and attention, two a multiplication.

        Args:
            rows: of the batch.
            tokens: of each row.

        Raises:
            ValueError: if that hangs on numbers, such as which expert a token chooses.
        """
        with self._without_numbers():
            return self.steps.operations(self._loss(rows, tokens))

    def _loss(self, rows: int, tokens: int) -> Callable[[], Tensor]:
        with numbers():
            batch = made_up_batch(self.task, inputs_for(self.model, rows, tokens))
        mean = TokenMean()

        def loss() -> Tensor:
            labels = labels_of_batch.passing(batch.get("labels"))
            with labels, _autocast(self.precision), nullcontext() if self.on_cpu else _FlashAttention():
                total, units = self.task.loss(self.task.outputs(self.model, batch), batch)
                return mean.scaled(total, units)

        return loss

    @contextmanager
    def _without_numbers(self) -> Iterator[None]:
        try:
            yield
        except UnknownShape as error:
            raise ValueError(
                f"what a step of {type(self.model).__name__} takes hangs on numbers, such as which expert a token "
                "chooses, and cannot be counted without them"
            ) from error
        except (RuntimeError, TypeError, NotImplementedError) as error:  # an operator that asks for more than shapes
            said = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"what a step of {type(self.model).__name__} takes cannot be counted without numbers: {said}"
            ) from error


@contextmanager
def imitated_step(
    base: BaseModel,
    task: Task,
    method: Method,
    optimizer: dict[str, Any],
    precision: str = "32-true",
    *,
    on_cpu: bool = False,
) -> Iterator[ImitatedStep]:
    """A block with a training step of a model that is adapted as it would be trained, without its numbers.

    Args:
        base: the base, of which the configuration alone is read.
        task: the task; it knows its labels.
        method: the method.
        optimizer: the optimizer's name and options, as `PeftModule` takes them.
        precision: the Trainer's.
        on_cpu: count what a step takes on a CPU, not on a GPU: attention with dropout keeps matrices of all pairs, and
            optimizers take one parameter at a time.

    Yields:
        The step, which means nothing after the block.

    Raises:
        ValueError: if the precision is unknown, the base is quantized otherwise than in
            bitsandbytes' 4 bits, or the method looks at data first.
    """
    if precision not in PRECISIONS:
        near = nearest(precision, PRECISIONS)
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, but got {precision!r}{near}")
    if isinstance(method, HFPeft) or (isinstance(method, DataDriven) and method.needs_data):
        why = "its layers are peft's own" if isinstance(method, HFPeft) else "it looks at data first"
        raise ValueError(f"what a step of {type(method).__name__} takes cannot be counted without numbers: {why}")
    if base.quantization is not None and not takes_4_bits(base.quantization):
        raise ValueError(
            f"what a step with quantization={base.quantization} takes cannot be counted, only with bitsandbytes' 4 "
            "bits (quantization=nf4), or without"
        )
    if base.offload_activations:
        raise ValueError("what a step with offload_activations=true takes on a GPU cannot be counted, only without it")
    if optimizer["name"] == "LBFGS":
        raise ValueError("a step of LBFGS is several; what it takes cannot be counted, only with other optimizers")
    kind, _, way = precision.partition("-")
    with imitated():
        model: Any = base.build(task, _DTYPES.get(kind) if way == "true" else None, _DTYPES.get(kind))
        model.train()
        adapt(model, method)
        made = make_optimizer(model, optimizer, method.learning_rate)
        yield ImitatedStep(model, task, made if on_cpu else _on_a_gpu(made), precision, on_cpu=on_cpu)


@dataclass(frozen=True)
class Step:
    """A training step that can be counted, also as it would be with something changed (`dataclasses.replace`).

    Attributes:
        base: the base.
        task: the task; it knows its labels.
        method: the method.
        optimizer: the optimizer's name and options.
        precision: the Trainer's.
        rows: of the batch.
        tokens: of each row, those of the mean row where they are packed; None for images.
        packed: whether the rows have no padding.
        on_cpu: whether the step is made on a CPU.
    """

    base: BaseModel
    task: Task
    method: Method
    optimizer: dict[str, Any]
    precision: str
    rows: int
    tokens: int | None
    packed: bool = False
    on_cpu: bool = False

    @property
    def spoken(self) -> str:
        """The size of its batch in words."""
        if self.packed:
            return f"{self.rows} rows packed to {self.rows * (self.tokens or 1):,} tokens"
        return spoken_batch(self.task, self.rows, self.tokens)

    def imitated(self) -> AbstractContextManager[ImitatedStep]:
        """A block with the step, as of `imitated_step`, which leaves the task and the method as they are."""
        task, method = copy.deepcopy((self.task, self.method))
        return imitated_step(self.base, task, method, self.optimizer, self.precision, on_cpu=self.on_cpu)

    def memory(self) -> StepMemory:
        """What it takes.

        Raises:
            ValueError: if that cannot be counted.
        """
        with self.imitated() as step:
            return step.memory(self.rows, self.tokens or 1)


def spoken_batch(task: Task, rows: int, tokens: int | None) -> str:
    """The size of a batch in words.

    Args:
        task: the task.
        rows: of the batch.
        tokens: of each row; None for images.
    """
    if isinstance(task, Processed):
        return f"{rows} image{'s' if rows > 1 else ''}"
    return f"{rows} {'pairs of ' if isinstance(task, DPO | Embedding) else 'x '}{tokens} tokens"


def _on_a_gpu(optimizer: Optimizer) -> Optimizer:
    """Has an optimizer take all parameters at once, as PyTorch's do on a GPU where nothing else is asked for."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


class _FlashAttention(TorchFunctionMode):
    """Leaves dropout out of attention: with it a CPU's keeps matrices of all pairs, and a GPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "dropout_p": 0.0}
            args = args[:4]
        return func(*args, **(kwargs or {}))


def _autocast(precision: str) -> AbstractContextManager[Any]:
    kind, _, way = precision.partition("-")
    return torch.autocast("cpu", _DTYPES[kind]) if way == "mixed" else nullcontext()
