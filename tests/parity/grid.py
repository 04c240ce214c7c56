"""Every method that Hugging Face PEFT knows too, under the options of both, and the models that one of them refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning_peft as lp
from lightning_peft import LoRA

MODELS = ("bert", "gpt2", "llama", "t5", "vit", "moe")
_ATTENTION = {
    "bert": ["query", "key", "value", "attention.output.dense"],
    "gpt2": ["c_attn"],
    "t5": ["q", "k", "v", "o"],
}
TARGETS = {m: _ATTENTION.get(m, ["q_proj", "k_proj", "v_proj", "o_proj"]) for m in MODELS}
"""The projections of attention, for what PEFT has no names of its own for."""

_FIRST, _LAST = (rf"(layer|layers|h|block)\.{i}\..*" for i in (0, 1))


@dataclass(frozen=True)
class Peer:
    """A method here and in PEFT.

    Attributes:
        name: the test's name for it; that of its row in the table of all methods, where it has one.
        make: our method for the model of a name.
        kind: PEFT's name for it.
        options: PEFT's for the same adapter.
        targets: PEFT's target modules: ``"all-linear"``, ``"attention"`` for `TARGETS`, or None for its own choice.
        is_prompt: whether it is one of PEFT's prompts, which it loads for inference alone.
        has_network: whether its vectors come out of a network, which PEFT's files leave out.
    """

    name: str
    make: Callable[[str], Any]
    kind: str = "LORA"
    options: dict[str, Any] = field(default_factory=dict)
    targets: str | None = "all-linear"
    is_prompt: bool = False
    has_network: bool = False


def _lora(name: str, targets: str = "all-linear", **options: Any) -> Peer:
    options = {"r": 4, "lora_alpha": 6, **options}
    return Peer(name, lambda _: LoRA(**options), options=options, targets=targets)


def _same(name: str, cls: Any, targets: str | None = "all-linear", **options: Any) -> Peer:
    return Peer(name, lambda _: cls(**options), cls.peft_type, options, targets)


def _prompt(name: str, cls: Any, *, network: bool = False, **options: Any) -> Peer:
    options = {"num_virtual_tokens": 4, **options}
    # peft takes for granted that a classifier trains its head beside a prompt
    heads = {"bert": ["classifier"]}
    parts = {} if cls is lp.PrefixTuning else {"num_transformer_submodules": 1}
    return Peer(
        name,
        lambda model: cls(modules_to_save=heads.get(model), **options),
        cls.peft_type,
        options | parts,
        None,
        is_prompt=True,
        has_network=network,
    )


PEERS = (
    _lora("lora"),
    _lora("lora_rs", use_rslora=True),
    _lora("dora", use_dora=True),
    _lora("pissa", "attention", init_lora_weights="pissa"),
    _lora("olora", "attention", init_lora_weights="olora"),
    _lora("lora_orthogonal", init_lora_weights="orthogonal"),
    _lora("lora_gaussian", init_lora_weights="gaussian"),
    _lora("eva", "attention", init_lora_weights="eva"),
    Peer("lora_fa", lambda _: LoRA(r=4, lora_alpha=6, lora_fa=True), options={"r": 4, "lora_alpha": 6}),
    _lora("lora_patterns", rank_pattern={_FIRST: 2}, alpha_pattern={_LAST: 3}),
    _lora("lora_b_bias", lora_bias=True),
    _lora("lora_layers", "attention", layers_to_transform=[1]),
    _same("adalora", lp.AdaLoRA, target_r=2, init_r=4, lora_alpha=6, total_step=20),
    _same("vera", lp.VeRA, r=4, d_initial=0.2),
    _same("loha", lp.LoHa, r=2, alpha=3),
    _same("lokr", lp.LoKr, r=2, alpha=3),
    _same("miss", lp.MiSS, r=5),
    _same("randlora", lp.RandLoRA, r=6, randlora_alpha=10),
    _same("oft", lp.OFT, oft_block_size=8),
    # peft has more than one butterfly factor only with an extension that is compiled for a GPU
    _same("boft", lp.BOFT, boft_block_size=4),
    _same("ia3", lp.IA3, None),
    _prompt("prompt_tuning", lp.PromptTuning),
    _prompt("p_tuning", lp.PTuning, network=True, encoder_hidden_size=6),
    _prompt("p_tuning_lstm", lp.PTuning, network=True, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"),
    _prompt("prefix_tuning", lp.PrefixTuning),
    _prompt("prefix_tuning_mlp", lp.PrefixTuning, network=True, prefix_projection=True, encoder_hidden_size=6),
    _same("llama_adapter", lp.LlamaAdapter, None, adapter_len=4, adapter_layers=2),
    _same("trainable_tokens", lp.TrainableTokens, None, token_indices=[14, 50, 9, 3]),
    _same("shira", lp.SparseTuning, r=4, random_seed=3),
    # peft has no such choice of its own, but takes any set of places
    Peer("fish_mask", lambda _: lp.SparseTuning(r=4, mask_type="gradient"), "SHIRA", {"r": 4}),
)

_LINEAR_ALONE = ("loha", "lokr", "miss", "oft", "boft", "shira", "fish_mask")
_NEED_TOKENS = ("prompt_tuning", "p_tuning", "p_tuning_lstm", "prefix_tuning", "prefix_tuning_mlp", "trainable_tokens")

REFUSED_HERE = {
    **{(name, "vit"): "that embeds tokens, but found none in ViT" for name in _NEED_TOKENS},
    **{
        ("llama_adapter", model): "needs the self-attention of a model of Llama's kind"
        for model in ("bert", "t5", "vit")
    },
}
"""What has no meaning, with the words of our error."""

REFUSED_BY_PEFT = {
    **{(name, "gpt2"): "Target module .*Conv1D.* (is )?not supported" for name in _LINEAR_ALONE},
    ("llama_adapter", "moe"): "Unsupported model type for adaption prompt: 'mixtral'",
}
"""What works here alone, with the words of PEFT's error."""

PAIRS = [(p, m) for p in PEERS for m in MODELS if (p.name, m) not in {**REFUSED_HERE, **REFUSED_BY_PEFT}]
