"""Tasks by their names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lightning_peft.core.problems import nearest
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.dpo import DPO
from lightning_peft.tasks.embedding import Embedding
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.sft import SupervisedFineTuning
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.text_classification import TextClassification
from lightning_peft.tasks.token_classification import TokenClassification

_TASKS: dict[str, Any] = {
    "text_classification": TextClassification,
    "token_classification": TokenClassification,
    "causal_lm": CausalLM,
    "sft": SupervisedFineTuning,
    "seq2seq": Seq2Seq,
    "dpo": DPO,
    "embedding": Embedding,
    "image_classification": ImageClassification,
}


def task_from_config(config: str | dict[str, Any]) -> Task:
    """The task that a name or a dictionary stands for.

    Args:
        config: ``"causal_lm"``, or ``{"name": "text_classification", "labels": [...]}``.

    Raises:
        ValueError: if the task or an option of it is unknown.
    """
    options = {"name": config} if isinstance(config, str) else dict(config)
    name = str(options.pop("name", ""))
    if name not in _TASKS:
        raise ValueError(f"task {name!r} is unknown{nearest(name, _TASKS)}")
    known = [f.name for f in fields(_TASKS[name])]
    unknown = [o for o in options if o not in known]
    if unknown:
        raise ValueError(f"task {name!r} has no option {unknown[0]!r}{nearest(unknown[0], known)}")
    task: Task = _TASKS[name](**options)
    return task
