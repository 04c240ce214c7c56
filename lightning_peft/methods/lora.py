"""LoRA: a low-rank change beside a frozen weight, ``h = W x + s B A x`` (Hu et al., arXiv 2106.09685, 4.1).

``A: (r, in)`` starts random, ``B: (out, r)`` at zero; ``s = alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA,
arXiv 2312.03732). Variants: the direction alone is changed so and the rows' lengths are trained beside it (DoRA,
arXiv 2402.09353); A stays as drawn (LoRA-FA, arXiv 2308.03303); other starts (``lora_init``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, MultiheadAttention

from lightning_peft.core.adapted import site_of
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, is_conv1d
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems, refuse_unknown
from lightning_peft.core.tree import AdapterTree
from lightning_peft.methods.linear import target_names
from lightning_peft.methods.lora_eva import input_directions
from lightning_peft.methods.lora_experts import (
    owner_of,
    parameter_layers,
    parameter_names,
    peft_place,
    refuse_ranks,
)
from lightning_peft.methods.lora_init import changed_base_problem, doubled, halved, is_apart, start_problems
from lightning_peft.methods.lora_layers import EmbeddingLayer, layer_for
from lightning_peft.methods.lora_low_rank import LowRank
from lightning_peft.methods.lora_on_linear import LinearLayer
from lightning_peft.methods.lora_targets import (
    b_bias_problems,
    biases_to_train,
    own_value,
    refuse_beyond_linear,
    refuse_idle_patterns,
)
from lightning_peft.methods.trainable_tokens import token_layers, token_places, token_problem


@dataclass
class LoRA:
    """Low-rank adaptation of linear, Conv1D, embedding, convolution and attention modules.

    Args:
        r: rank of the change, from 1 to the smaller side of any weight. 8 is enough for most single tasks; more rank
            asks for more data.
        lora_alpha: strength of the change, above 0. 16, twice the default rank, keeps the learning rate's range.
        lora_dropout: share of the input that A does not see in training, from 0 up to but not including 1.
        use_rslora: divide alpha by ``sqrt(r)`` instead of ``r``, which keeps high ranks learning.
        target_modules: a list of exact names or dotted suffixes, a regular expression for the whole name, or
            ``"all-linear"`` for every linear layer but the output head. All layers is what works best. Which one is
            the head only transformers' models say: in another net a small head is for ``exclude_modules``, or gets a
            rank of its own by ``rank_pattern``. An empty list leaves modules out, beside ``target_parameters``.
        target_parameters: parameters by exact name or dotted suffix (``"experts.down_proj"``), for weights that
            belong to no linear layer: the stacked ones of a mixture's experts, each expert with factors of its own.
            What is excluded and which layers count says nothing of them.
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        rank_pattern: ranks of their own for some modules, by name, suffix or regular expression.
        alpha_pattern: the same for ``lora_alpha``.
        init_lora_weights: where the factors start: True (A random, B zero), ``"gaussian"``, ``"orthogonal"``,
            ``"olora"``, ``"pissa"``, ``"pissa_niter_4"``, or ``"eva"`` (A from training data; without a Trainer call
            ``adapter.prepare``). Those from orthogonal to pissa change the base in the papers; here what they start
            with is subtracted instead, so that the base stays the base. On a quantized base ``"loftq"`` starts as what
            quantizing has lost (LoftQ, arXiv 2310.08659, with one step). All for linear layers only.
        use_dora: also train the lengths of the weight's rows. Linear layers only.
        lora_bias: also train a bias beside B. Linear layers only, and not with ``use_dora``.
        lora_fa: leave A as it starts, which halves what trains and keeps no input for the backward pass.
            Linear layers only.
        bias: which biases of the base train too: ``"none"``, ``"lora_only"`` (of adapted modules), ``"all"``.
        trainable_token_indices: ids of tokens whose rows of the input embedding train too, where it is tied those of
            the output head with them; ``{"embed_tokens": [5, 8]}`` names another module that holds them.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW; about ten times that of full fine-tuning.

    Raises:
        ValueError: if a number or a choice is out of its range.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import adapt
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> adapter = adapt(model, LoRA(r=2, target_modules=["0"]))
        >>> sorted(adapter.state_dict())
        ['0.lora_A', '0.lora_B']
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    lora_fa: bool = False
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    modules_to_save: list[str] | None = None
    learning_rate: float = 2e-3

    peft_type: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        biases = ("none", "lora_only", "all")
        raise_problems(
            "LoRA",
            [
                *range_problems(self, counts=["r"], positive=["lora_alpha", "learning_rate"], shares=["lora_dropout"]),
                *(
                    f"rank_pattern: {k!r} must be a whole number of 1 or more, but is {v}" if v < 1 else None
                    for k, v in self.rank_pattern.items()
                ),
                *(
                    f"alpha_pattern: {k!r} must be above 0, but is {v!r}" if v <= 0 else None
                    for k, v in self.alpha_pattern.items()
                ),
                *start_problems(self.init_lora_weights, [self.r, *self.rank_pattern.values()], fixed=self.lora_fa),
                *(b_bias_problems(self.bias, use_dora=self.use_dora) if self.lora_bias else ()),
                *(token_problem("trainable_token_indices", ids) for _, ids in self._tokens()),
                f"bias must be one of {biases}, but got {self.bias!r}" if self.bias not in biases else None,
            ],
        )

    @property
    def starts_apart(self) -> bool:
        """Whether the factors' product is not zero at the start, and what it is has to be subtracted."""
        return is_apart(self.init_lora_weights)

    @property
    def needs_codes(self) -> bool:
        """Whether the factors make up for the rounding of a quantized base."""
        return self.init_lora_weights == "loftq"

    def make_up(self, model: Module, layers: dict[str, AdapterLayer]) -> None:
        """Sets the factors to the largest singular values of what quantizing each weight has lost.

        Args:
            model: the root.
            layers: those of its linear modules.

        Raises:
            ValueError: if a weight is not quantized, or what it was before is not known.
        """
        modules = base_modules(model)
        for name, layer in layers.items():
            if isinstance(layer, LinearLayer):
                layer.make_up(name, modules[name])

    @property
    def needs_data(self) -> bool:
        """Whether A starts from data."""
        return self.init_lora_weights == "eva"

    def prepare(self, model: Module, tree: AdapterTree, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Sets each A to the main directions of its module's input.

        Args:
            model: the adapted model.
            tree: the adapter.
            losses: run the model on a batch of training data.

        Raises:
            ValueError: if no batch has as many tokens as the rank.
        """
        factors = {n: x.lora_A for n, x in tree.layers_by_module.items() if isinstance(x, LowRank)}
        modules = {n: model.get_submodule(n) for n in factors}
        with torch.no_grad():
            for name, rows in input_directions(model, modules, {n: len(a) for n, a in factors.items()}, losses).items():
                factors[name].copy_(rows)

    def rank(self, name: str) -> int:
        """The rank for the module of that name."""
        return int(own_value(self.rank_pattern, name, self.r))

    def scale(self, name: str) -> float:
        """The factor ``s`` on the change of the module of that name."""
        r = self.rank(name)
        return float(own_value(self.alpha_pattern, name, self.lora_alpha)) / (math.sqrt(r) if self.use_rslora else r)

    def place(self, model: Module) -> Placement:
        """A low-rank layer for each matched module.

        Args:
            model: the root; it is not changed.

        Returns:
            The layers, and the biases that train in place.

        Raises:
            ValueError: if nothing matches or a matched module has no low-rank form.
        """
        kinds = "Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d or MultiheadAttention"
        names: list[str] = []
        if self.target_modules != [] or not self.target_parameters:
            names = target_names(model, self, self.target_modules, lambda m: layer_for(m) is not None, kinds)
        parameters = parameter_names(model, self.target_parameters, names)
        there = [*names, *parameters]
        refuse_idle_patterns({"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}, there)
        linear_only = {
            "use_dora=True": self.use_dora,
            "lora_bias=True": self.lora_bias,
            "lora_fa=True": self.lora_fa,
            f"init_lora_weights={self.init_lora_weights!r}": self.starts_apart or self.needs_data or self.needs_codes,
        }
        refuse_beyond_linear(model, names, [option for option, given in linear_only.items() if given])
        layers: dict[str, AdapterLayer] = {}
        modules = base_modules(model)
        for name in names:
            module = modules[name]
            kind = layer_for(module)
            assert kind is not None
            layers[name] = kind(name, module, self)
        layers |= parameter_layers(model, parameters, self)
        for target, ids in self._tokens():
            own = ("trainable_token_indices", "trainable_token_indices")
            rows = token_layers("LoRA", model, target, ids, self.modules_to_save, options=own)
            twice = sorted(rows.keys() & layers.keys())
            if twice:
                raise ValueError(
                    f"LoRA: {twice[0]!r} has trained rows (trainable_token_indices) and cannot have another layer "
                    "beside them; exclude it, or name it once"
                )
            layers |= rows
        return Placement(layers, in_place=biases_to_train(model, names, self.bias))

    def refuse_beyond(self, model: Module, layers: dict[str, AdapterLayer]) -> None:
        """Refuses a rank above the smaller side of a weight.

        Raises:
            ValueError: if there is one; it names the first such module or parameter.
        """
        refuse_ranks(layers, self.rank)

    def _tokens(self) -> list[tuple[list[str] | None, list[int]]]:
        """Where rows of tokens train, None being the input embedding, and of which tokens."""
        given = self.trainable_token_indices
        if isinstance(given, dict):
            return [([name], ids) for name, ids in given.items()]
        return [] if given is None else [(None, given)]

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; the targets are written as resolved names."""
        # what a start apart from zero subtracts is written as half of a LoRA of twice the rank
        times = 2 if self.starts_apart else 1
        alpha_times = math.sqrt(times) if self.use_rslora else times
        parameters = [n for n in parameter_names(model, self.target_parameters) if owner_of(n) in placed]
        rows = [token_places("LoRA", model, target) for target, _ in self._tokens()]
        others = {n for places in rows for owner, tied in places.items() for n in (owner, *tied)}
        others |= {owner_of(n) for n in parameters}
        modules = [n for n in placed if n not in others]
        return {
            "r": self.r * times,
            "lora_alpha": self.lora_alpha * alpha_times,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "rank_pattern": {k: v * times for k, v in self.rank_pattern.items()},
            "alpha_pattern": {k: v * alpha_times for k, v in self.alpha_pattern.items()},
            "bias": self.bias,
            "target_modules": sorted(modules),
            "target_parameters": parameters or None,
            "trainable_token_indices": self.trainable_token_indices,
            "fan_in_fan_out": bool(modules) and all(is_conv1d(model.get_submodule(n)) for n in modules),
            "init_lora_weights": True,
        }

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors as a plain LoRA has them: ``B A - B0 A0`` is one product of twice the rank."""
        return doubled(tensors) if self.starts_apart else tensors

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors out of what `to_peft` made."""
        return halved(stored) if self.starts_apart else stored

    def peft_name(self, key: str, model: Module) -> str:
        """``q_proj.lora_A`` is ``base_model.model.q_proj.lora_A.weight``; embeddings' tensors have no ``.weight``."""
        place, _, leaf = key.rpartition(".")
        if leaf == "lora_B_bias":
            return f"base_model.model.{place}.lora_B.bias"
        if leaf == "trainable_tokens_delta":
            return f"base_model.model.{place}.token_adapter.{leaf}"
        if leaf in ("lora_A", "lora_B"):
            parent, _, child = place.rpartition(".")
            if self.target_parameters and place in parameter_names(model, self.target_parameters):
                place = peft_place(model, place, self.target_parameters)
            elif child == "out_proj" and isinstance(model.get_submodule(parent), MultiheadAttention):
                place = f"{parent}.base_layer.out_proj"
            return f"base_model.model.{place}.{leaf}.weight"
        site = site_of(model.get_submodule(place)) if leaf.endswith("bias") else None
        if site is not None and any(isinstance(x, (LowRank, EmbeddingLayer)) for x in site.layers.values()):
            return f"base_model.model.{place}.base_layer.{leaf}"
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> LoRA:
        """The LoRA that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here, such as DoRA.
        """
        names = [f.name for f in fields(cls) if f.name != "learning_rate"]
        # these say nothing of a trained adapter, or nothing unless another option, which is refused, is on
        idle = ["fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"]
        refuse_unknown("LoRA", config, known=[*names, *idle])
        raise_problems("LoRA", [changed_base_problem(config.get("init_lora_weights"))])
        if config.get("target_parameters") and config.get("target_modules") is None:
            # peft writes the names that it found, so there were none
            config = {**config, "target_modules": []}
        # where the factors started says nothing of an adapter that is trained
        options = {n: config[n] for n in names if config.get(n) is not None and n != "init_lora_weights"}
        # what a file leaves out is PEFT's default, which is another here
        return cls(**{"lora_alpha": 8, **options})
