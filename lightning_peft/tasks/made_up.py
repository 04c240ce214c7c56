"""Batches that nobody wrote, as long as any may be: what a training step takes hangs on their sizes alone."""

from __future__ import annotations

from typing import Any

import torch

from lightning_peft.tasks.dpo import DPO
from lightning_peft.tasks.embedding import Embedding
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.token_classification import TokenClassification


def made_up_batch(task: Task, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch to train on, of which every row is as long as the batch and every token counts.

    Args:
        task: the task, which knows its labels.
        inputs: what the model takes of so many rows, with an ``attention_mask`` if these are texts, ``(rows, tokens)``.

    Returns:
        The batch as the task's ``collate`` makes it, with numbers; pairs of texts are two rows of it each.
    """
    ids = next(iter(inputs.values()))
    rows = len(ids)
    if isinstance(task, LabelledTask):
        return {**inputs, "labels": _labels(task, rows)}
    if isinstance(task, DPO | Embedding):
        inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    if isinstance(task, Embedding):
        keys = torch.arange(rows)[:, None].expand(rows, 2)
        return {**inputs, "keys": keys, "score": torch.arange(rows, dtype=torch.float32)}
    if isinstance(task, TokenClassification | Seq2Seq):
        return {**inputs, "labels": torch.zeros_like(ids)}
    return {**inputs, "labels": inputs["input_ids"]}


def _labels(task: Any, rows: int) -> torch.Tensor:
    kind = getattr(task, "problem_type", "single_label_classification")
    if kind == "single_label_classification":
        return torch.zeros(rows, dtype=torch.long)
    return torch.zeros(rows, task.num_labels if kind == "regression" else len(task.labels))
