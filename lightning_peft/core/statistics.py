"""Running statistics of batch norms: those of the base stay, those that train are kept, or put back after a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.core.adapted import attach, site_of
from lightning_peft.core.adapters import Adapters
from lightning_peft.core.matching import base_modules


def moving_statistics(model: Module, in_place: list[str]) -> list[str]:
    """Names of the running statistics of the batch norms that train: they move with the parameters.

    Args:
        model: the root.
        in_place: names of the parameters that train in place.
    """
    owners = {n.rpartition(".")[0] for n in in_place}
    modules = base_modules(model) if owners else {}
    return [
        f"{name}.{buffer}" if name else buffer
        for name, module in modules.items()
        if name in owners and _has_statistics(module)
        for buffer in module._buffers
    ]


class KeptStatistics:
    """Copies of the running statistics that a training step moves, to be put back where the step is left out.

    Args:
        model: any module; its batch norms are looked for once.
    """

    def __init__(self, model: Module) -> None:
        self._norms = [m for m in model.modules() if _has_statistics(m)]
        self._copies: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Copies what the batch norms in training mode hold now."""
        moving = [b for norm in self._norms if norm.training for b in norm.buffers(recurse=False)]
        self._copies = [(buffer, buffer.detach().clone()) for buffer in moving]

    @torch.no_grad()
    def put_back(self) -> None:
        """Lets them hold again what was copied last."""
        for buffer, copied in self._copies:
            buffer.copy_(copied)


def _has_statistics(module: Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def freeze_statistics(model: Module, modules: dict[str, Module], adapters: Adapters) -> None:
    """Keeps batch norms that do not train in eval mode: their running statistics are part of the base.

    Args:
        model: the root.
        modules: its own by name.
        adapters: its adapters.
    """
    for module in modules.values():
        if _has_statistics(module):
            trains = any(p.requires_grad for p in module.parameters(recurse=False))
            site = site_of(module)
            if trains:
                if site is not None and site.frozen_statistics:
                    site.frozen_statistics = False
                    module.train(model.training)
                continue
            attach(module, adapters.switch).frozen_statistics = True
            module.eval()
