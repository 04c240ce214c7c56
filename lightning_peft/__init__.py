"""Parameter-efficient fine-tuning for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft import methods
    from lightning_peft.callbacks.checkpoint_files import last_checkpoint
    from lightning_peft.callbacks.interrupt import SaveOnInterrupt
    from lightning_peft.callbacks.loading import load_from_checkpoint
    from lightning_peft.callbacks.non_finite_loss import NonFiniteLoss
    from lightning_peft.callbacks.peft_callback import PeftCallback
    from lightning_peft.combination import combine
    from lightning_peft.core.activation import activate, active_adapters, adapter_names
    from lightning_peft.data import ImageDataModule, TextDataModule
    from lightning_peft.handle import Adapter, adapt, load_adapter
    from lightning_peft.methods import *  # noqa: F403 - a new method is one name there and none here
    from lightning_peft.methods.lora_plus import lora_plus_groups
    from lightning_peft.module import PeftModule
    from lightning_peft.tasks import (
        DPO,
        CausalLM,
        Embedding,
        ImageClassification,
        Seq2Seq,
        SupervisedFineTuning,
        TextClassification,
        TokenClassification,
    )

__version__ = "0.1.0"

# Where each public name lives, methods aside: imported when asked for, so that `import lightning_peft` loads
# neither Lightning nor transformers, and the core works without them.
_HOMES = {
    "Adapter": "handle",
    "CausalLM": "tasks",
    "DPO": "tasks",
    "Embedding": "tasks",
    "ImageClassification": "tasks",
    "ImageDataModule": "data",
    "NonFiniteLoss": "callbacks.non_finite_loss",
    "PeftCallback": "callbacks.peft_callback",
    "PeftModule": "module",
    "SaveOnInterrupt": "callbacks.interrupt",
    "Seq2Seq": "tasks",
    "SupervisedFineTuning": "tasks",
    "TextClassification": "tasks",
    "TextDataModule": "data",
    "TokenClassification": "tasks",
    "activate": "core.activation",
    "active_adapters": "core.activation",
    "adapt": "handle",
    "adapter_names": "core.activation",
    "combine": "combination",
    "last_checkpoint": "callbacks.checkpoint_files",
    "load_adapter": "handle",
    "load_from_checkpoint": "callbacks.loading",
    "lora_plus_groups": "methods.lora_plus",
}

if TYPE_CHECKING:
    __all__ = [
        "DPO",
        "Adapter",
        "CausalLM",
        "Embedding",
        "ImageClassification",
        "ImageDataModule",
        "NonFiniteLoss",
        "PeftCallback",
        "PeftModule",
        "SaveOnInterrupt",
        "Seq2Seq",
        "SupervisedFineTuning",
        "TextClassification",
        "TextDataModule",
        "TokenClassification",
        "activate",
        "active_adapters",
        "adapt",
        "adapter_names",
        "combine",
        "last_checkpoint",
        "load_adapter",
        "load_from_checkpoint",
        "lora_plus_groups",
    ]
    __all__ += methods.__all__


def _public() -> list[str]:
    return sorted([*_HOMES, *importlib.import_module(f"{__name__}.methods").__all__])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__all__":  # asked for by a star import alone, which may load torch to learn the methods' names
        return _public()
    hint = ""
    if not name.startswith("_"):
        methods = importlib.import_module(f"{__name__}.methods")
        if name in methods.__all__:
            return getattr(methods, name)
        from lightning_peft.core.problems import nearest

        same_letters = [n for n in _public() if n.lower() == name.lower()]
        hint = f"; did you mean {same_letters[0]!r}?" if same_letters else nearest(name, _public())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
