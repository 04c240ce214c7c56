"""EVA: A starts as the main directions of what the layer sees (Paischer et al., arXiv 2410.07170, 3).

An incremental singular value decomposition over the batches of training data (Ross et al., 2008) finds the
directions that explain most of the variance of each layer's input, padding left out (but for what a decoder's
cross-attention reads of the encoder). All modules keep the rank that they were given: the paper's second part, which
moves ranks between them, is left out, since an optimizer holds the factors by then. Tokens without a label count too,
which PEFT leaves out unless told otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.matching import base_modules, is_within
from lightning_peft.core.problems import raise_problems

CLOSE = 0.99
"""Cosine between a direction before and after a batch from which on it counts as found, as in PEFT."""

UNSEEN = (
    "LoRA(init_lora_weights='eva') takes A from data that it has not seen; call adapter.prepare(losses) before the "
    "first training step"
)


def is_seen(a: Tensor, b: Tensor) -> bool:
    """Whether factors have been taken from data, or trained, wherever they come from.

    Args:
        a: ``(r, in)``, whose rows are main directions then: of length 1 and at right angles.
        b: ``(out, r)``, zero until it is trained.
    """
    products = a @ a.T - torch.eye(len(a), dtype=a.dtype, device=a.device)
    return bool(products.abs().max() < 1e-3) or bool(b.any())


class Components:
    """The main directions of rows that come in batches.

    Args:
        count: how many directions.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.found = False
        self.directions: Tensor | None = None  # (count, features)
        self._strengths: Tensor | None = None
        self._mean: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Takes in one batch.

        Args:
            rows: ``(rows, features)``; fewer rows than directions say too little and are passed over.
        """
        rows = rows.float()
        if len(rows) < self.count:
            return
        mean = rows.mean(0)
        parts = [rows - mean]
        if self.directions is not None and self._strengths is not None and self._mean is not None:
            shift = (self.seen * len(rows) / (self.seen + len(rows))) ** 0.5
            parts = [self._strengths.unsqueeze(1) * self.directions, *parts, shift * (self._mean - mean).unsqueeze(0)]
            mean = (self.seen * self._mean + len(rows) * mean) / (self.seen + len(rows))
        strengths, directions = _main(torch.cat(parts), self.count)
        if self.directions is not None:
            # a direction and its opposite are the same
            signs = (directions * self.directions).sum(1, keepdim=True).sign()
            directions = torch.where(signs == 0, directions, directions * signs)
            self.found = bool(((directions * self.directions).sum(1) >= CLOSE).all())
        self.seen += len(rows)
        self.directions, self._strengths, self._mean = directions, strengths, mean


def _main(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their right vectors; a sketch of twice as many where that is much less work."""
    sketch = 2 * count
    if 4 * sketch < min(rows.shape):
        _, strengths, v = torch.svd_lowrank(rows, sketch, niter=4)
        return strengths[:count], v.T[:count].contiguous()
    _, strengths, vt = torch.linalg.svd(rows, full_matrices=False)
    return strengths[:count], vt[:count]


@torch.no_grad()
def input_directions(
    model: Module, modules: dict[str, Module], ranks: dict[str, int], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """The main directions of what each module is given.

    Modules that are given the same tensor (query, key and value) share one decomposition.

    Args:
        model: the root; what in it takes an ``attention_mask`` of (batch, tokens) tells padding.
        modules: the modules by name.
        ranks: how many directions each wants.
        losses: run the model on a batch; they are called until all directions stand, or until they end. A batch need
            not reach every module.

    Returns:
        ``(rank, in)`` by name.

    Raises:
        ValueError: if a module was given as many rows as directions are wanted by no batch, or was never called.
    """
    given: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: given.__setitem__(name, [*args, *kwargs.values()][0])

    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    masks: dict[str, Tensor | None] = {}
    handles += _noting_masks(model, masks)
    shared: dict[str, Components] = {}
    try:
        for loss in losses:
            given.clear()
            masks.clear()
            loss()
            shared |= _grouped({n: x for n, x in given.items() if n not in shared}, ranks)
            for components, name in {id(shared[n]): (shared[n], n) for n in given}.values():
                if not components.found:
                    components.update(_text_rows(given[name], name, masks))
            if len(shared) == len(modules) and all(c.found for c in shared.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    unseen = [n for n in modules if n not in shared]
    short = [n for n in modules if n in shared and shared[n].directions is None]
    raise_problems(
        "EVA",
        [
            f"no batch reached {unseen[0]!r}; leave it out (exclude_modules), or show more batches" if unseen else None,
            f"no batch gave {short[0]!r} as many tokens as its rank of {ranks[short[0]]}; take larger batches or a "
            "lower rank"
            if short
            else None,
        ],
    )
    return {n: c.directions[: ranks[n]] for n, c in shared.items() if c.directions is not None}


def _noting_masks(model: Module, masks: dict[str, Tensor | None]) -> list[Any]:
    """Hooks that note by module which mask of (batch, tokens) it is given, or that it is given none."""

    def note(name: str, names: list[str]) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = (dict(zip(names, args, strict=False)) | kwargs).get("attention_mask")
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
                masks[name] = mask

        return hook

    arguments = {n: list(inspect.signature(m.forward).parameters) for n, m in base_modules(model).items()}
    return [
        model.get_submodule(name).register_forward_pre_hook(note(name, names), with_kwargs=True)
        for name, names in arguments.items()
        if "attention_mask" in names
    ]


def _text_rows(x: Tensor, name: str, masks: dict[str, Tensor | None]) -> Tensor:
    """What a module is given as rows, without those of padding, which the nearest mask around it tells."""
    around = [n for n in masks if not n or is_within(name, [n])]
    mask = masks[max(around, key=len)] if around else None
    if mask is None or mask.shape != x.shape[:-1]:
        return x.flatten(0, -2)
    return x[mask.bool().to(x.device)]


def _grouped(given: dict[str, Tensor], ranks: dict[str, int]) -> dict[str, Components]:
    groups: dict[int, list[str]] = {}
    for name, tensor in given.items():
        groups.setdefault(id(tensor), []).append(name)
    made: dict[str, Components] = {}
    for names in groups.values():
        made |= dict.fromkeys(names, Components(max(ranks[n] for n in names)))
    return made
