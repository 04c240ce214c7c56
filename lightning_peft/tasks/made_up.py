"""Batches that nobody wrote, as long as any may be: what a training step takes hangs on their sizes, not the words."""

from __future__ import annotations

from typing import Any

import torch

from lightning_peft.tasks.dpo import DPO
from lightning_peft.tasks.embedding import Embedding
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.padding import IGNORED
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.task import Task


def made_up_batch(task: Task, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch to train on, of which every row is full, the last one by all but a token, and every token counts.

    That one token of padding makes models build masks, which full rows alone would not.

    Args:
        task: the task, which knows its labels.
        inputs: what the model takes of so many rows, with an ``attention_mask`` if these are texts, ``(rows, tokens)``.

    Returns:
        The batch as the task's ``collate`` makes it, with numbers; pairs of texts are two rows of it each.
    """
    ids = next(iter(inputs.values()))
    rows = len(ids)
    mask = inputs.get("attention_mask")
    if mask is not None and rows > 1 and mask.shape[1] > 1:
        mask[-1, -1] = 0
    if isinstance(task, LabelledTask):
        return {**inputs, "labels": _labels(task, rows)}
    if isinstance(task, DPO | Embedding):
        inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    if isinstance(task, Embedding):
        keys = torch.arange(rows)[:, None].expand(rows, 2)
        return {**inputs, "keys": keys, "score": torch.arange(rows, dtype=torch.float32)}
    if isinstance(task, Seq2Seq):
        longest = min(ids.shape[1], task.max_target_length or ids.shape[1])
        return {**inputs, "labels": ids.new_ones(rows, longest)}
    return {**inputs, "labels": torch.zeros_like(ids).masked_fill(inputs["attention_mask"] == 0, IGNORED)}


def _labels(task: Any, rows: int) -> torch.Tensor:
    kind = getattr(task, "problem_type", "single_label_classification")
    if kind == "single_label_classification":
        return torch.zeros(rows, dtype=torch.long)
    return torch.zeros(rows, task.num_labels if kind == "regression" else len(task.labels))
