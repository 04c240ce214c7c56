"""An adapted module: its class is swapped for a generated subclass whose forward runs through adapter layers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from lightning_peft.core.base import Base
from lightning_peft.core.by_rows import by_rows, untraced
from lightning_peft.core.generated import SITE, adapted_class
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.routing import Switch, bind


class Site:
    """The place of one adapted module: its layers by adapter name, and how a call runs through them.

    The layers are registered in the adapters' trees, not here: the module keeps its children and names.
    """

    def __init__(self, module: Module, switch: Switch, is_root: bool) -> None:
        self.base = Base(module)
        self.switch = switch
        self.layers: dict[str, AdapterLayer] = {}
        self.is_root = is_root
        self.frozen_statistics = False
        self.off_fused_path = False

    @property
    def idle(self) -> bool:
        """Whether nothing asks for this module to stay adapted."""
        needed = self.is_root or self.layers or self.base.in_place
        return not (needed or self.frozen_statistics or self.off_fused_path)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the original forward through the active layers, the first active adapter innermost."""
        if self.is_root and not torch.compiler.is_compiling():
            with self.switch.pinned():
                return self._through(args, kwargs)
        return self._through(args, kwargs)

    def _through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and len(kwargs) == 1 and not self.base.module._modules:
            # a single layer called by its input's name, which is not the adapter layers'
            args, kwargs = tuple(kwargs.values()), {}
        routing = self.switch.routing
        if routing.rows is not None:
            run = untraced() if "torch._dynamo" in sys.modules else by_rows
            return bind(run(self, routing, routing.rows, args, kwargs), routing, self.switch)
        call: Callable[..., Any] = self.base
        for name in routing.active:
            layer = self.layers.get(name)
            if layer is not None:
                call = functools.partial(layer, call)
        return bind(call(*args, **kwargs), routing, self.switch)


def site_of(module: Module) -> Site | None:
    """The adapted module's site, or None for a module that is not adapted."""
    site: Site | None = module.__dict__.get(SITE)
    return site


def instance_forward_of(module: Module) -> Callable[..., Any] | None:
    """The ``forward`` that lies, or lay before adaptation, on the module itself instead of its class, or None."""
    site = site_of(module)
    forward: Callable[..., Any] | None = module.__dict__.get("forward")
    return forward if site is None else site.base.instance_forward


def attach(module: Module, switch: Switch, *, is_root: bool = False) -> Site:
    """Adapts a module, once.

    Args:
        module: the module; its class is swapped, nothing in it is renamed or registered.
        switch: the model's switch.
        is_root: whether it is the root of what is adapted.

    Returns:
        Its site, the one it had if it was adapted before.
    """
    site = site_of(module)
    if site is None:
        site = Site(module, switch, is_root)
        module.__dict__[SITE] = site
        module.__class__ = adapted_class(type(module))
        # last, since another thread may be about to run it
        module.__dict__.pop("forward", None)
    site.is_root = site.is_root or is_root
    return site


def detach(module: Module) -> None:
    """Gives the module back its class and its instance-level forward; does nothing if it is not adapted."""
    site = site_of(module)
    if site is None:
        return
    # in this order there is always a forward for another thread that is about to run the module
    if site.base.instance_forward is not None and "forward" not in module.__dict__:
        module.__dict__["forward"] = site.base.instance_forward
    module.__class__ = site.base.cls
    del module.__dict__[SITE]
