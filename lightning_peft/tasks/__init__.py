"""What a kind of task means: the model's head, how examples become tensors, the loss and the metrics."""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.dpo import DPO
from lightning_peft.tasks.embedding import Embedding
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.registry import task_from_config
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.sft import SupervisedFineTuning
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.text_classification import TextClassification
from lightning_peft.tasks.token_classification import TokenClassification

__all__ = [
    "DPO",
    "CausalLM",
    "Embedding",
    "ImageClassification",
    "Seq2Seq",
    "SupervisedFineTuning",
    "Task",
    "TextClassification",
    "TokenClassification",
    "task_from_config",
]
