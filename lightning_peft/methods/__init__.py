"""The methods: one file each, with the options as a dataclass and the layer."""

from lightning_peft.methods.bottleneck import BottleneckAdapter
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.selective import Selective

__all__ = ["BottleneckAdapter", "LoRA", "PromptTuning", "Selective"]
