"""The methods: one file each, with the options as a dataclass and the layer."""

from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.boft import BOFT
from lightning_peft.methods.bottleneck import BottleneckAdapter
from lightning_peft.methods.compacter import Compacter
from lightning_peft.methods.deep_prompt import DeepPrompt
from lightning_peft.methods.hf_peft import HFPeft
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.ladder_side_tuning import LadderSideTuning
from lightning_peft.methods.llama_adapter import LlamaAdapter
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.loreft import LoReFT
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.randlora import RandLoRA
from lightning_peft.methods.selective import Selective
from lightning_peft.methods.sparse_tuning import SparseTuning
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.methods.vera import VeRA

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "AdaLoRA",
    "BottleneckAdapter",
    "Compacter",
    "DeepPrompt",
    "HFPeft",
    "LadderSideTuning",
    "LlamaAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "MiSS",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "Selective",
    "SparseTuning",
    "TrainableTokens",
    "VeRA",
]
