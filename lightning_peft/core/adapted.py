"""An adapted module: its class is swapped for a generated subclass whose forward runs through adapter layers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from lightning_peft.core.generated import SITE, adapted_class
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.routing import Routing, Switch, bind
from lightning_peft.core.rows import IndivisibleError, Rows, Split, join, refuse_handing_on, refuse_indivisible, take
from lightning_peft.core.view import with_tensors


class Base:
    """The original forward of one adapted module, as a callable that knows its module.

    Attributes:
        module: the adapted module.
        cls: its class before adaptation.
        instance_forward: a ``forward`` that lay on the instance (accelerate's hooks put it there), or None.
        in_place: names of its parameters, dotted below it, that train in place and so stay float32.
        cast_to: the dtype that those would have if they did not train, or None if that is float32.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.cls = type(module)
        self.instance_forward: Callable[..., Any] | None = module.__dict__.pop("forward", None)
        self.in_place: tuple[str, ...] = ()
        self.cast_to: torch.dtype | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the original forward."""
        casts = self.casts()
        if casts:
            # Some models cast what they hand to a layer to its weight's dtype (T5), which is float32 here
            return self.cls.forward(self.view(casts), *(self._as_computed(a) for a in args), **kwargs)
        if self.in_place and is_quantized(self.module._parameters.get("weight")):
            return self.cls.forward(self.view(self._beside_codes(args)), *args, **kwargs)
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        return self.cls.forward(self.module, *args, **kwargs)

    def view(self, tensors: dict[str, Tensor]) -> Module:
        """The module before adaptation, with some parameters replaced, for calling its class's forward."""
        twin = with_tensors(self.module, tensors)
        twin.__dict__.pop(SITE)
        twin.__class__ = self.cls
        return twin

    def casts(self) -> dict[str, Tensor]:
        """The parameters that train in place, cast to what the module computes in; empty in float32."""
        if self.cast_to is None:
            return {}
        parameters = {name: self.module.get_parameter(name) for name in self.in_place}
        return {n: p.to(self.cast_to) for n, p in parameters.items() if p.dtype != self.cast_to}

    def _beside_codes(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """What trains beside codes, as the layer computes with it: bitsandbytes' would cast the parameter itself."""
        dtype = next((a.dtype for a in args if isinstance(a, Tensor)), torch.float32)
        wanted: torch.dtype = getattr(self.module, "compute_dtype", None) or dtype
        return {name: self.module.get_parameter(name).to(wanted) for name in self.in_place}

    def _as_computed(self, argument: Any) -> Any:
        """A floating-point input in the dtype that a layer without children computes in."""
        if isinstance(argument, Tensor) and argument.is_floating_point() and not self.module._modules:
            return argument.to(self.cast_to)
        return argument

    def plain_weight(self, x: Tensor) -> Tensor | None:
        """The weight, if a fused operator may read it instead of calling the forward.

        ``torch.nn.functional.linear`` takes a meta or otherwise absent weight without a word and returns
        garbage, so everything that is not a plain local Linear goes through the forward.

        Args:
            x: the module's input.

        Returns:
            The frozen dense weight on the input's device, or None.
        """
        if self.cls is not Linear or self.instance_forward is not None:
            return None
        weight = self.module._parameters.get("weight")
        frozen = is_frozen_here(weight) and "weight" not in self.in_place
        return weight if frozen and weight is not None and weight.device == x.device else None


def is_frozen_here(weight: Tensor | None) -> bool:
    """Whether a weight is a dense one of this process that does not train."""
    return type(weight) is Parameter and not weight.requires_grad and weight.layout is torch.strided


def is_watched(module: Module) -> bool:
    """Whether something beside its forward runs when a module is called.

    Args:
        module: any module.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


def is_frozen_linear(module: Module) -> bool:
    """Whether a module is a Linear as PyTorch has it, not adapted, watched or replaced, whose parameters rest.

    Args:
        module: any module.
    """
    if type(module) is not Linear or "forward" in module.__dict__ or module._forward_hooks:
        return False
    return is_frozen_here(module.weight) and (module.bias is None or is_frozen_here(module.bias))


def innermost(base: Callable[..., Any]) -> Base:
    """The original forward behind the callable that a layer was given, other adapters' layers in between or not."""
    while not isinstance(base, Base):
        base = base.args[0]  # type: ignore[attr-defined]  # the functools.partial of an inner layer
    return base


def module_of(base: Callable[..., Any]) -> Module:
    """The adapted module behind the callable that a layer was given."""
    return innermost(base).module


def compute_dtype(base: Callable[..., Any]) -> torch.dtype | None:
    """The dtype in which the module behind ``base`` computes: that of its first floating-point parameter.

    Args:
        base: the callable that an adapter layer was given.

    Returns:
        The dtype, or None for a module without floating-point parameters.
    """
    return next((p.dtype for p in module_of(base).parameters() if p.is_floating_point()), None)


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
            by_rows = _untraced() if "torch._dynamo" in sys.modules else Site._by_rows
            return bind(by_rows(self, routing, routing.rows, args, kwargs), routing)
        call: Callable[..., Any] = self.base
        for name in routing.active:
            layer = self.layers.get(name)
            if layer is not None:
                call = functools.partial(layer, call)
        return bind(call(*args, **kwargs), routing)

    def _by_rows(self, routing: Routing, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each example through the layer of its own adapter, or a refusal that names the adapters."""
        here = {n: self.layers[n] for n in rows.methods if n in self.layers}
        if not here:
            return self.base(*args, **kwargs)
        for name, layer in here.items():
            if not layer.divisible:
                refuse_handing_on(name, rows.methods[name])
        try:
            split = rows.split(self.base.module, args, kwargs)
            output = self._together(rows, here, args, kwargs)
            return self._parted(routing, split, args, kwargs) if output is NotImplemented else output
        except IndivisibleError as error:
            raise RuntimeError(f"{error}; {rows.apart(here)}") from None

    def _together(
        self, rows: Rows, here: dict[str, AdapterLayer], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """All examples in one call, if the layers are of one kind that can do that and nobody watches one of them."""
        layers = here.values()
        kinds = {type(layer) for layer in layers}
        if len(kinds) > 1 or any(is_watched(layer) for layer in layers):
            return NotImplemented
        by_example: list[Any] = [here.get(n) if n is not None else None for n in rows.names]
        return kinds.pop().together(by_example, self.base, *args, **kwargs)

    def _parted(self, routing: Routing, split: Split, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original forward once for all examples, and around each group of them its adapter's layer."""
        whole = _Once(functools.partial(self._whole, routing, args, kwargs))
        outputs, parts = [], []
        for name, index in split.groups.items():
            inputs = take((args, kwargs), index, split.total)
            part = _Part(self, name, whole, inputs, index, split.total)
            layer = None if name is None else self.layers.get(name)
            # what a layer calls beside its base, such as a projection inside, gets this group's rows alone
            with self.switch.pinned(Routing(() if name is None else (name,))):
                outputs.append((part if layer is None else functools.partial(layer, part))(*inputs[0], **inputs[1]))
            parts.append(part)
            if not part.ran:  # a copy of the module ran instead, on what is its part of the inputs
                refuse_indivisible(self.base.module, inputs, len(index))
        if all(output is part.given for output, part in zip(outputs, parts, strict=True)):
            return whole()
        return join(self.base.module, outputs, split)

    def _whole(self, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.switch.pinned(routing):
            return self.base(*args, **kwargs)


@functools.cache
def _untraced() -> Callable[..., Any]:
    """`Site._by_rows` without torch.compile, which leaves its graph in an ``adapter_names`` block and goes on there."""
    return torch.compiler.disable(Site._by_rows)  # type: ignore[no-untyped-call, no-any-return]


class _Once:
    """A call that is made when its result is first asked for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.result: Any = _NOTHING

    def __call__(self) -> Any:
        if self.result is _NOTHING:
            self.result = self.call()
        return self.result


class _Part(Base):
    """The original forward for some examples of a batch: their part of what it gives for the whole batch.

    With inputs that a layer changed it runs on these alone, with their adapter in whatever lies inside it.
    """

    def __init__(
        self,
        site: Site,
        name: str | None,
        whole: Callable[[], Any],
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        index: Tensor,
        count: int,
    ) -> None:
        self.__dict__.update(site.base.__dict__)
        self.site, self.name, self.whole, self.inputs, self.index, self.count = site, name, whole, inputs, index, count
        self.ran = False
        self.given: Any = _NOTHING

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.ran = True
        before, named = self.inputs
        if len(args) == len(before) and kwargs.keys() == named.keys():
            pairs = [*zip(args, before, strict=True), *((kwargs[k], named[k]) for k in named)]
            if all(now is then for now, then in pairs):
                if self.given is _NOTHING:
                    self.given = take(self.whole(), self.index, self.count)
                return self.given
        refuse_indivisible(self.module, (args, kwargs), len(self.index))
        with self.site.switch.pinned(Routing(() if self.name is None else (self.name,))):
            return self.site.base(*args, **kwargs)

    def plain_weight(self, x: Tensor) -> Tensor | None:
        """None: the whole batch goes through the forward at once."""
        return None


_NOTHING = object()


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
    site.is_root = site.is_root or is_root
    return site


def detach(module: Module) -> None:
    """Gives the module back its class and its instance-level forward; does nothing if it is not adapted."""
    site = module.__dict__.pop(SITE, None)
    if site is None:
        return
    module.__class__ = site.base.cls
    if site.base.instance_forward is not None and "forward" not in module.__dict__:
        module.__dict__["forward"] = site.base.instance_forward
