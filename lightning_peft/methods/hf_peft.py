"""The bridge: any tuner of the installed Hugging Face PEFT (https://github.com/huggingface/peft), run by this package.

PEFT makes the tuner's layers on a twin of the model, which shares the weights and is thrown away; here they run
around the model's own modules. So nothing in the base is replaced, and checkpoints, removal, several adapters and
export are those of every other method. What deviates: a bias, token rows and whole modules that train beside a tuner
are this package's own business, and what would change the base's weights at the start is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.filled import are_filled_later
from lightning_peft.core.matching import ALL_LINEAR, is_within, match_modules
from lightning_peft.core.method import Placement
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.hf_peft_config import at_random, plain_config, problems_of, ready_config, tuner_class
from lightning_peft.methods.hf_peft_layers import PeftLayer
from lightning_peft.methods.hf_peft_prompts import FROZEN, PROMPT_TENSORS, place_prompt
from lightning_peft.methods.hf_peft_tuners import has_merge, place_tuner
from lightning_peft.methods.linear import is_linear


@dataclass
class HFPeft:
    """Whatever ``peft`` has: a `peft.PeftConfig`, or its options as a dictionary with ``peft_type``.

    Args:
        config: the configuration; afterwards a plain dictionary of all its options. Its ``target_modules`` may be
            names, suffixes, a regular expression or ``"all-linear"``, which they are where none are given and the
            tuner is one for linear modules.
        modules_to_save: modules that train in full, as copies that the adapter owns; those of the configuration
            where it names some.
        learning_rate: suits AdamW; which rate a tuner needs varies, see its paper.

    Raises:
        ImportError: if ``peft`` is not installed.
        ValueError: if the kind or an option is unknown, or is one that cannot run here, with the reason.
    """

    config: dict[str, Any]
    modules_to_save: list[str] | None = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        self.config, saved = plain_config(self.config)
        check_types(self)
        self.modules_to_save = saved if self.modules_to_save is None else self.modules_to_save
        raise_problems(
            f"HFPeft({self.peft_type})",
            [
                *range_problems(self, positive=["learning_rate"]),
                *problems_of(self.config),
            ],
        )

    @property
    def peft_type(self) -> str:
        """PEFT's name for the kind of tuner."""
        return str(self.config["peft_type"])

    @property
    def mergeable(self) -> bool:
        """Whether PEFT's layers of this kind have a merge; it may refuse a module that has no bias to add to."""
        return has_merge(tuner_class(self.config))

    def place(self, model: Module) -> Placement:
        """PEFT's layers for the modules that its configuration names.

        Args:
            model: the root; it is not changed.

        Raises:
            ValueError: if a pattern matches nothing, PEFT has no layer for a module, or the tuner does something to
                the model that cannot be taken back.
        """
        if self._is_prompt:
            return place_prompt(model, ready_config(at_random(self.config) if are_filled_later() else self.config))
        return place_tuner(model, ready_config(self._for_model(model)), is_saved=self._is_saved(model))

    @property
    def _is_prompt(self) -> bool:
        return "num_virtual_tokens" in self.config

    def _for_model(self, model: Module) -> dict[str, Any]:
        """The options with checked targets; ``"all-linear"`` as the names of the modules."""
        config = dict(self.config)
        if "target_modules" not in config or ready_config(config).is_adaption_prompt:
            return config
        target = config["target_modules"] or self._default_target(model)
        if target is not None:
            layers = None if config.get("layers_pattern") else config.get("layers_to_transform")
            names = match_modules(model, target, exclude=config.get("exclude_modules"), layers=layers)
            is_saved = self._is_saved(model)
            config["target_modules"] = [n for n in names if not is_saved(n)] if target == ALL_LINEAR else target
        return config

    def _default_target(self, model: Module) -> str | None:
        """All linear modules, unless PEFT's own choice for the model is of other modules, such as its norms."""
        known = getattr(tuner_class(self.config), "target_module_mapping", None)
        if known is None:
            return None
        kind = getattr(getattr(model, "config", None), "model_type", None)
        named = known.get(kind)
        if named is None:
            return ALL_LINEAR
        modules = match_modules(model, [named] if isinstance(named, str) else list(named))
        return ALL_LINEAR if any(is_linear(model.get_submodule(n)) for n in modules) else None

    def _is_saved(self, model: Module) -> Any:
        saved = match_modules(model, self.modules_to_save, option="modules_to_save") if self.modules_to_save else []
        return lambda name: is_within(name, saved)

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``: all options, targets that were chosen here as resolved names."""
        config = {k: v for k, v in self.config.items() if k != "task_type" or v is not None}
        if self._is_prompt:
            return config | {"num_transformer_submodules": 1}
        if config.get("target_modules", "") in (None, ALL_LINEAR) and not ready_config(self.config).is_adaption_prompt:
            config["target_modules"] = sorted(n for n in placed if n)
        return config

    def peft_name(self, key: str, model: Module) -> str:
        """The name that PEFT gives the tensor."""
        if self._is_prompt:
            leaf = key.rpartition(".")[2]
            return leaf if leaf in PROMPT_TENSORS else f"base_model.{key}"
        adapters = adapters_of(model)
        for tree in () if adapters is None else adapters.trees.values():
            for place, layer in tree.layers_by_module.items():
                if tree.record.method is not self or not isinstance(layer, PeftLayer):
                    continue
                name = layer.file_names.get(key.removeprefix(f"{place}."))
                if name is not None and key.startswith(f"{place}."):
                    return name
        return f"base_model.model.{key}"

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Self:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that cannot run here.
        """
        # a file of a prompt holds what a network gave and not the network, and what it started from lies elsewhere
        return cls(config={k: False if k == "prefix_projection" else v for k, v in at_random(config).items()})

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file: rows of a prompt that do not train stand before those that do."""
        packed = dict(tensors)
        for key in [k for k in tensors if k.rpartition(".")[2] == FROZEN]:
            table = key.removesuffix(FROZEN) + "prompt_embeddings"
            packed[table] = torch.cat([packed.pop(key), packed[table]])
        return packed

    def from_peft(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors out of what `to_peft` made."""
        frozen = self.config.get("num_frozen_tokens", 0)
        tensors = dict(stored)
        for key in [k for k in stored if frozen and k.rpartition(".")[2] == "prompt_embeddings"]:
            tensors[key.removesuffix("prompt_embeddings") + FROZEN] = stored[key][:frozen]
            tensors[key] = stored[key][frozen:]
        return tensors
