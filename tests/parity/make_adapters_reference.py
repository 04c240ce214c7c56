"""Reference values from AdapterHub's ``adapters``, which wants an older transformers than this library.

It runs in an environment of its own and imports nothing of lightning_peft::

    python3 -m venv adapters_env
    adapters_env/bin/pip install torch==2.13.0 adapters==1.3.0 safetensors
    adapters_env/bin/python tests/parity/make_adapters_reference.py

Each model's file in ``adapters_reference/`` has the base's tensors (``base/``), what goes in (``input/``), the base's
output, and for each case the adapter's tensors under the names that ``adapters`` gives them before (``<case>/start/``)
and after ten steps of SGD (``<case>/end/``), the first output and the ten losses; all in float64. Its metadata has the
versions, the model's configuration, and each case's configuration and untouched start (mean and spread of each tensor).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import AdapterModelInterface
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

FOLDER = Path(__file__).parent / "adapters_reference"
STEPS, LEARNING_RATE, MOMENTUM = 10, 3e-2, 0.9

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "vocab_size": 23, "pad_token_id": 0}
T5 = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4, "d_kv": 4, "vocab_size": 23, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**SIZES, "vocab_size": 23, "max_position_embeddings": 16}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 23, "n_positions": 16}
        | {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "llama": ("LlamaForCausalLM", {**DECODER, "max_position_embeddings": 16}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 4, "max_position_embeddings": 16}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", {**SIZES, "image_size": 6, "patch_size": 2}),
}
# adapters knows no Mixtral, but takes a description of a model's parts
MIXTRAL = AdapterModelInterface(
    adapter_methods=["bottleneck", "reft", "invertible"],
    model_embeddings="embed_tokens",
    model_layers="layers",
    layer_self_attn="self_attn",
    layer_cross_attn=None,
    attn_q_proj="q_proj",
    attn_k_proj="k_proj",
    attn_v_proj="v_proj",
    attn_o_proj="o_proj",
    layer_intermediate_proj="block_sparse_moe.gate",
    layer_output_proj="block_sparse_moe",
    layer_pre_self_attn="input_layernorm",
    layer_pre_ffn="post_attention_layernorm",
)

BY_NAME: dict[str, Any] = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "pfeiffer_attention": adapters.SeqBnConfig(reduction_factor=8, mh_adapter=True),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "compacter_own_rules": adapters.CompacterConfig(reduction_factor=2, shared_phm_rule=False, phm_rank=2),
    "madx": adapters.SeqBnInvConfig(reduction_factor=4),
    "madx_houlsby": adapters.DoubleSeqBnInvConfig(reduction_factor=4),
    "loreft": adapters.LoReftConfig(r=3, prefix_positions=2, suffix_positions=1, tied_weights=True, dropout=0.0),
    "loreft_own_weights": adapters.LoReftConfig(r=2, prefix_positions=1, suffix_positions=2, dropout=0.0),
    "prefix": adapters.PrefixTuningConfig(prefix_length=3, flat=True),
    "prefix_network": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
}
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel", "compacter", "compacter_own_rules")
EDITS = ("loreft", "loreft_own_weights")
CASES: dict[str, tuple[str, ...]] = {
    "bert": (*BOTTLENECKS, "pfeiffer_attention", "madx", *EDITS, "prefix", "prefix_network"),
    "gpt2": (*BOTTLENECKS, "madx", *EDITS, "prefix", "prefix_network"),
    "llama": (*BOTTLENECKS, "madx", *EDITS, "prefix"),
    "qwen3": ("madx", "madx_houlsby"),
    "mixtral": ("houlsby", "pfeiffer", "compacter", "madx", *EDITS),
    "t5": (*BOTTLENECKS, "pfeiffer_attention", "madx", *EDITS),
    "vit": ("houlsby", "pfeiffer", "compacter_own_rules"),
}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Where models ask for float32 inside, in norms and softmax, they get float64: rounding there would hide much."""
    single, convert = torch.float32, Tensor.float
    torch.float32 = torch.float = torch.float64
    Tensor.float = Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        Tensor.float = convert


def base(name: str) -> Any:
    """A model with random weights, biases and norms included, in float64."""
    kind, options = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options, attn_implementation="eager")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Two rows, the second one shorter, or two pictures."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 23, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": torch.randint(3, 23, (2, 4), generator=generator)} if name == "t5" else {}
    return {"input_ids": ids * mask, "attention_mask": mask, **more}


def adapted(name: str, case: str) -> tuple[Any, dict[str, nn.Parameter], dict[str, list[float]]]:
    """The model with one adapter, moved away from its start; its parameters; mean and spread of the start."""
    model = base(name)
    adapters.init(model, interface=MIXTRAL if name == "mixtral" else None)
    config = BY_NAME[case]
    if name == "t5" and case in EDITS:
        config = config.replace(layers=[0, 1])  # the encoder's
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)  # an orthogonal map that is made in float32 is not orthogonal in float64
    model.add_adapter("a", config=config)
    torch.set_default_dtype(torch.float32)
    model.train_adapter("a")
    model.double().eval()
    own = {n: p for n, p in model.named_parameters() if ".a." in n}
    start = {n: [p.mean().item(), p.std().item() if p.numel() > 1 else 0.0] for n, p in own.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, parameter in own.items():
            if "parametrizations" in n:  # an orthogonal matrix starts at random
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model, own, start


def projections(model: Any) -> dict[str, Any]:
    """LoReFT's orthogonal maps: what they are made of is the library's own affair, what they are is not."""
    return {n: m for n, m in model.named_modules() if n.endswith(".projection") and ".a." in n}


def state(model: Any, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The adapter's tensors, orthogonal maps as what they are."""
    plain = {n: p.detach().clone() for n, p in own.items() if "parametrizations" not in n}
    return plain | {f"{n}.weight": m.weight.detach().clone() for n, m in projections(model).items()}


def loss_of(output: Tensor) -> Tensor:
    """Something that every entry of the output moves."""
    return output.pow(2).mean()


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss's derivative by each orthogonal map."""
    maps = projections(model)
    if not maps:
        return {}
    for module in maps.values():
        module.requires_grad_(True)
    with parametrize.cached():
        weights = {n: m.weight for n, m in maps.items()}
        found = torch.autograd.grad(loss_of(model(**given).logits), list(weights.values()))
    for module in maps.values():
        module.requires_grad_(False)
    return {f"{n}.weight": g for n, g in zip(weights, found, strict=True)}


def run(name: str, case: str, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """One case: the start, the output, ten steps, the end."""
    model, own, start = adapted(name, case)
    stored = {f"start/{n}": t for n, t in state(model, own).items()}
    with all_in_float64():
        stored["output"] = model(**given).logits.detach().clone()
        stored |= {f"gradient/{n}": t for n, t in gradients(model, given).items()}
    trained = [p for n, p in own.items() if "parametrizations" not in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=MOMENTUM)
    losses = []
    for _ in range(STEPS):
        with all_in_float64():
            loss = loss_of(model(**given).logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    stored["losses"] = torch.stack(losses)
    stored |= {f"end/{n}": t for n, t in state(model, own).items()}
    return {f"{case}/{n}": t.contiguous() for n, t in stored.items()}, start


def write(name: str) -> None:
    """One model's file."""
    model, given = base(name), inputs(name)
    tensors = {f"base/{n}": t.detach().clone() for n, t in model.state_dict().items()}
    tensors |= {f"input/{n}": t for n, t in given.items()}
    with torch.no_grad(), all_in_float64():
        tensors["base_output"] = model(**given).logits.clone()
    cases = {}
    for case in CASES[name]:
        stored, start = run(name, case, given)
        tensors |= stored
        cases[case] = {"config": BY_NAME[case].to_dict(), "start": start}
        losses = stored[f"{case}/losses"]
        moved = (stored[f"{case}/output"] - tensors["base_output"]).abs().max()
        print(f"{name:8} {case:20} moved {moved:.2f}  loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    metadata = {
        "versions": {"adapters": adapters.__version__, "transformers": transformers.__version__}
        | {"torch": torch.__version__},
        "model": {"class": MODELS[name][0], "config": MODELS[name][1]},
        "optimizer": {"lr": LEARNING_RATE, "momentum": MOMENTUM},
        "cases": cases,
    }
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / f"{name}.safetensors", {k: json.dumps(v) for k, v in metadata.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or MODELS:
        write(chosen)
