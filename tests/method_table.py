"""Every method, a row each: the invariants run over this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lightning_peft as lp
from lightning_peft import BottleneckAdapter, LoRA, PromptTuning, Selective

LANGUAGE = ("bert", "gpt2", "llama", "t5")
EVERYWHERE = (*LANGUAGE, "convnet", "encoder")


@dataclass(frozen=True)
class Row:
    """A method in the table.

    Attributes:
        name: the test's name for it.
        make: makes the method.
        models: models that it works on.
        identity: whether the model starts as the base, to the bit.
        mergeable: whether it can be merged.
    """

    name: str
    make: Callable[[], Any]
    models: tuple[str, ...] = LANGUAGE
    identity: bool = True
    mergeable: bool = True


TABLE = (
    Row("lora", lambda: LoRA(r=4, lora_alpha=6), (*LANGUAGE, "phi", "moe", "vit")),
    Row("lora_rs_bias", lambda: LoRA(r=4, lora_alpha=6, use_rslora=True, bias="all"), ("bert", "gpt2")),
    Row(
        "lora_regex",
        lambda: LoRA(r=2, lora_alpha=3, target_modules=r".*(conv1|conv2|self_attn|linear1|head)"),
        ("convnet", "encoder"),
    ),
    Row(
        "lora_embedding",
        lambda: LoRA(r=2, lora_alpha=3, target_modules=r".*(word_embeddings|wte|embed_tokens)"),
        ("bert", "gpt2", "llama"),
    ),
    Row(
        "lora_saved_head",
        lambda: LoRA(r=2, lora_alpha=3, modules_to_save=["head"], target_modules=["conv1"]),
        ("convnet",),
    ),
    Row(
        "lora_experts",
        lambda: LoRA(r=4, lora_alpha=6, target_parameters=["gate.weight", "experts.gate_up_proj", "experts.down_proj"]),
        ("moe",),
    ),
    Row("lora_volumes", lambda: LoRA(r=2, lora_alpha=3, target_modules=["conv1", "conv2", "head"]), ("volumes",)),
    Row("lora_fused_qkv", lambda: LoRA(r=4, lora_alpha=6, target_modules=["qkv_proj"]), ("phi",)),
    Row("dora", lambda: LoRA(r=4, lora_alpha=6, use_dora=True), (*LANGUAGE, "phi", "vit")),
    Row("lora_fa", lambda: LoRA(r=4, lora_alpha=6, lora_fa=True), ("bert", "gpt2")),
    Row("lora_patterns", lambda: LoRA(r=4, rank_pattern={r"\S*layer.0.\S*": 2}, alpha_pattern={"key": 3}), ("bert",)),
    Row("lora_b_bias", lambda: LoRA(r=4, lora_alpha=6, lora_bias=True), ("bert", "gpt2")),
    Row("lora_tokens", lambda: LoRA(r=4, lora_alpha=6, trainable_token_indices=[14, 50, 9])),
    Row(
        "lora_tokens_two_ends",
        lambda: LoRA(r=4, trainable_token_indices={"embed_tokens": [50, 14], "lm_head": [8]}),
        ("llama",),
    ),
    Row("lora_gaussian", lambda: LoRA(r=4, lora_alpha=6, init_lora_weights="gaussian"), ("bert",)),
    Row("pissa", lambda: LoRA(r=4, lora_alpha=6, init_lora_weights="pissa"), ("bert", "gpt2", "llama")),
    Row("pissa_dora", lambda: LoRA(r=4, use_rslora=True, use_dora=True, init_lora_weights="pissa_niter_4"), ("bert",)),
    Row("olora", lambda: LoRA(r=4, lora_alpha=6, init_lora_weights="olora"), ("bert",)),
    Row("eva", lambda: LoRA(r=4, lora_alpha=6, init_lora_weights="eva"), ("bert", "gpt2")),
    Row("lora_orthogonal", lambda: LoRA(r=4, lora_alpha=6, init_lora_weights="orthogonal"), ("bert",)),
    Row("adalora", lambda: lp.AdaLoRA(target_r=2, init_r=4, lora_alpha=6)),
    Row("full", lambda: Selective(), EVERYWHERE),
    Row("gradual_unfreezing", lambda: Selective(unfreeze_until=0.5), ("bert", "t5")),
    Row("bitfit", lambda: Selective(parameter_types=["bias"]), ("bert", "gpt2", "convnet", "encoder")),
    Row("norm", lambda: Selective(parameter_types=["norm"]), EVERYWHERE),
    Row("last_layers", lambda: Selective(last_layers=1), (*LANGUAGE, "encoder")),
    Row("embeddings", lambda: Selective(parameter_types=["embedding"])),
    Row("head", lambda: Selective(parameter_types=["head"]), ("bert", "llama")),
    Row("houlsby", lambda: BottleneckAdapter(reduction_factor=4), mergeable=False),
    Row(
        "pfeiffer",
        lambda: BottleneckAdapter(mh_adapter=False, original_ln_before=True, reduction_factor=4, non_linearity="gelu"),
        mergeable=False,
    ),
    Row("parallel", lambda: BottleneckAdapter(is_parallel=True, scaling=2.0, reduction_factor=4), mergeable=False),
    Row(
        "madx",
        lambda: BottleneckAdapter(mh_adapter=False, original_ln_before=True, reduction_factor=4, inv_adapter="nice"),
        mergeable=False,
    ),
    Row("compacter", lambda: lp.Compacter(reduction_factor=4), mergeable=False),
    Row(
        "compacter_own_rules",
        lambda: lp.Compacter(reduction_factor=4, shared_phm_rule=False, phm_rank=2, mh_adapter=False),
        ("bert",),
        mergeable=False,
    ),
    Row("ladder_side_tuning", lambda: lp.LadderSideTuning(reduction_factor=4), (*LANGUAGE, "encoder"), mergeable=False),
    Row(
        "ladder_one_rung",
        lambda: lp.LadderSideTuning(reduction_factor=4, layers_to_transform=[0]),
        ("gpt2",),
        mergeable=False,
    ),
    Row("ia3", lambda: lp.IA3(), (*LANGUAGE, "vit")),
    Row("vera", lambda: lp.VeRA(r=4), (*LANGUAGE, "vit")),
    Row("loha", lambda: lp.LoHa(r=2, alpha=3), (*LANGUAGE, "vit")),
    Row("loha_convolutions", lambda: lp.LoHa(r=2, target_modules=["conv1", "conv2"]), ("convnet",)),
    Row("lokr", lambda: lp.LoKr(r=2, alpha=3)),
    Row("lokr_both", lambda: lp.LoKr(r=1, decompose_both=True, init_weights="lycoris", decompose_factor=4), ("bert",)),
    Row("lokr_convolutions", lambda: lp.LoKr(r=1, target_modules=["conv1", "conv2"]), ("convnet",)),
    Row("miss", lambda: lp.MiSS(r=5)),
    Row("miss_mini", lambda: lp.MiSS(r=8, init_weights="mini", mini_r=4), ("bert", "llama")),
    Row("miss_bat", lambda: lp.MiSS(r=4, init_weights="bat"), ("bert", "llama")),
    Row("randlora", lambda: lp.RandLoRA(r=6, randlora_alpha=10)),
    Row("randlora_sparse", lambda: lp.RandLoRA(r=6, randlora_alpha=10, very_sparse=True), ("bert",)),
    Row("oft", lambda: lp.OFT(oft_block_size=8), (*LANGUAGE, "vit")),
    Row("oft_exact", lambda: lp.OFT(r=4, oft_block_size=0, use_cayley_neumann=False), ("bert",)),
    Row("oft_shared", lambda: lp.OFT(oft_block_size=8, block_share=True, num_cayley_neumann_terms=3), ("bert",)),
    Row("boft", lambda: lp.BOFT()),
    Row("shira", lambda: lp.SparseTuning(r=4, random_seed=3)),
    Row("shira_magnitude", lambda: lp.SparseTuning(r=4, mask_type="magnitude"), ("bert", "gpt2")),
    Row("fish_mask", lambda: lp.SparseTuning(r=4, mask_type="gradient")),
    Row("trainable_tokens", lambda: lp.TrainableTokens([14, 50, 9, 3])),
    Row(
        "trainable_tokens_two_ends",
        lambda: lp.TrainableTokens([50, 14], target_modules=["embed_tokens", "lm_head"]),
        ("llama",),
    ),
    Row("loreft", lambda: lp.LoReFT(r=3, positions="f2+l1"), (*LANGUAGE, "roberta"), mergeable=False),
    Row("loreft_own_weights", lambda: lp.LoReFT(r=3, positions="f2+l1", share_weights=False), mergeable=False),
    Row(
        "loreft_everywhere",
        lambda: lp.LoReFT(r=3, positions="all", layer_modules=r"encoder\.layers\.\d"),
        ("encoder",),
        mergeable=False,
    ),
    Row("hf_hra", lambda: lp.HFPeft({"peft_type": "HRA", "r": 4}), ("bert", "llama", "t5"), identity=False),
    Row("hf_fourierft", lambda: lp.HFPeft({"peft_type": "FOURIERFT", "n_frequency": 20}), identity=False),
    Row("hf_ln_tuning", lambda: lp.HFPeft({"peft_type": "LN_TUNING"}), ("gpt2", "llama")),
    Row(
        "hf_prefix_tuning",
        lambda: lp.HFPeft({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}),
        ("gpt2", "llama"),
        identity=False,
        mergeable=False,
    ),
    Row("prompt_tuning", lambda: PromptTuning(4), identity=False, mergeable=False),
    Row("p_tuning", lambda: lp.PTuning(num_virtual_tokens=4), identity=False, mergeable=False),
    Row(
        "p_tuning_lstm",
        lambda: lp.PTuning(num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=5),
        ("llama",),
        identity=False,
        mergeable=False,
    ),
    Row(
        "deep_prompt",
        lambda: lp.DeepPrompt(num_virtual_tokens=4),
        (*LANGUAGE, "roberta"),
        identity=False,
        mergeable=False,
    ),
    Row("prefix_tuning", lambda: lp.PrefixTuning(4), identity=False, mergeable=False),
    Row(
        "prefix_tuning_mlp",
        lambda: lp.PrefixTuning(4, prefix_projection=True, encoder_hidden_size=5),
        identity=False,
        mergeable=False,
    ),
    Row("llama_adapter", lambda: lp.LlamaAdapter(adapter_len=4), ("gpt2", "llama"), mergeable=False),
)


def shown_data(adapter: lp.Adapter) -> lp.Adapter:
    """The adapter itself, after it has seen a batch if its method looks at data before it trains."""
    if adapter.needs_data:
        model: Any = adapter.model
        ids = torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(4))
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        adapter.prepare([lambda: model(input_ids=ids, **more).logits.pow(2).mean()])
    return adapter


CASES = [(row, model) for row in TABLE for model in row.models]
IDS = [f"{row.name}-{model}" for row, model in CASES]
