"""What to do about an error that ends a training, in the numbers of that training, beside the error itself."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_peft.analysis.sizes import size
from lightning_peft.core.quantized import memory


class Advice(Callback):
    """Adds a note to an error of too little memory, or of a data worker that is gone; it is raised all the same."""

    def __init__(self) -> None:
        self._batch: Any = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = _shape(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            exception.add_note(memory_advice(pl_module, self._batch, trainer.accumulate_grad_batches))
        elif _worker_is_gone(exception):
            exception.add_note(
                "A process that makes batches ended, most often because the machine had no memory left for it: take a "
                "smaller num_workers. What was saved before is whole; go on from it with ckpt_path='last'."
            )
        self._batch = None


def _worker_is_gone(error: BaseException) -> bool:
    """Whether a process that makes batches has ended: the loader says so, unless it was just handing a batch over."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    places = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (OSError, EOFError)) and "torch.multiprocessing.reductions" in places


def memory_advice(module: LightningModule, batch: tuple[int, ...] | None, accumulated: int) -> str:
    """What takes a training's memory, and what to change, the cheapest first.

    Args:
        module: the module that trains.
        batch: the shape of the batch that did not fit, its rows first; None where it is not known.
        accumulated: batches in an optimizer step.
    """
    parameters = dict(module.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    base = sum(memory(p) for p in parameters.values())
    count = sum(p.numel() for p in trained)
    beside = 12 * count  # gradients and AdamW's two moments, each in 32 bits
    lines = [
        f"The weights take {size(base)}; gradients and AdamW's states of {count:,} trained parameters take "
        f"{size(beside)} more; the rest is what a batch leaves for the backward pass."
    ]
    if batch:
        rows, length = batch[0], batch[1] if len(batch) == 2 else None
        lines.append(f"The batch: {rows} rows" + (f" of {length} tokens, padding counted." if length else "."))
        if rows > 1:
            half = rows // 2
            accumulate = accumulated * -(-rows // half)
            lines.append(f"- batch_size={half} with accumulate_grad_batches={accumulate}: steps of as many rows")
        if length:
            lines.append(f"- a max_length below {length}: what the backward pass keeps grows with it, or faster")
    lines += [
        "- activation_checkpointing=1 (PeftModule), or the model's gradient_checkpointing_enable(): layers are run "
        "again in the backward pass, and keep their inputs alone",
        "- precision=bf16-mixed, or bf16-true, which halves the weights too; a base in 4 bits (quantization=nf4)",
    ]
    if beside > base / 4:
        lines.insert(1, f"- fewer trained parameters, a smaller rank: theirs are {size(beside)}; or an 8-bit optimizer")
    return "\n".join(lines)


def _shape(batch: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor of a batch, in which texts are ``(rows, tokens)``."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape) if batch.dim() else None
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((shape for value in values if (shape := _shape(value)) is not None), None)
