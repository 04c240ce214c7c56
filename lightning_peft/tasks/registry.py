"""Tasks by their names."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_peft.core.problems import nearest
from lightning_peft.formats.reading import naming
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


def task_said_by(file: str | Path, config: Any) -> Task:
    """The task that an adapter's folder or a checkpoint holds, which is not to be trusted.

    Args:
        file: where it was read, for errors.
        config: what stands there, as a task's ``to_config`` gave it.

    Raises:
        ValueError: if the task or an option of it is unknown or of another type, or names a file.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{file}: what it says of the task must be a dictionary with its name, but is {config!r}")
    template = config.get("chat_template")
    if isinstance(template, str) and template.endswith(".jinja") and "{" not in template:
        raise ValueError(f"{file}: the task's chat_template must be a template, but names the file {template!r}")
    with naming(file):
        return task_from_config(config)
