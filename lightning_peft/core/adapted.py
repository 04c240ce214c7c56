"""An adapted module: its class is swapped for a generated subclass whose forward runs through adapter layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import (
    Linear,
    Module,
    Parameter,
    Sequential,
    TransformerEncoder,
    TransformerEncoderLayer,
)

from lightning_peft.core.adapters import Adapters
from lightning_peft.core.layer import AdapterLayer, moved_only
from lightning_peft.core.routing import Switch, bind
from lightning_peft.core.view import with_tensors

_SITE = "_peft_site"
_classes: dict[type, type] = {}

# torch's fused encoder path reads all weights of the layers below and calls none of them. Each of these
# attributes, when false, keeps a module of that class off it.
_FUSED_PATH_FLAGS: dict[type, str] = {
    TransformerEncoderLayer: "activation_relu_or_gelu",
    TransformerEncoder: "use_nested_tensor",
}


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
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        return self.cls.forward(self.module, *args, **kwargs)

    def view(self, tensors: dict[str, Tensor]) -> Module:
        """The module before adaptation, with some parameters replaced, for calling its class's forward."""
        twin = with_tensors(self.module, tensors)
        twin.__dict__.pop(_SITE)
        twin.__class__ = self.cls
        return twin

    def casts(self) -> dict[str, Tensor]:
        """The parameters that train in place, cast to what the module computes in; empty in float32."""
        if self.cast_to is None:
            return {}
        parameters = {name: self.module.get_parameter(name) for name in self.in_place}
        return {n: p.to(self.cast_to) for n, p in parameters.items() if p.dtype != self.cast_to}

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
        if type(weight) is not Parameter or weight.requires_grad or weight.device != x.device:
            return None
        if "weight" in self.in_place or weight.layout is not torch.strided:
            return None
        return weight


def innermost(base: Callable[..., Any]) -> Base:
    """The original forward behind the callable that a layer was given, other adapters' layers in between or not."""
    while not isinstance(base, Base):
        base = base.args[0]  # type: ignore[attr-defined]  # the functools.partial of an inner layer
    return base


def module_of(base: Callable[..., Any]) -> Module:
    """The adapted module behind the callable that a layer was given."""
    return innermost(base).module


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
        active = self.switch.active
        call: Callable[..., Any] = self.base
        for name in active:
            layer = self.layers.get(name)
            if layer is not None:
                call = functools.partial(layer, call)
        return bind(call(*args, **kwargs), active)


def site_of(module: Module) -> Site | None:
    """The adapted module's site, or None for a module that is not adapted."""
    site: Site | None = module.__dict__.get(_SITE)
    return site


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
        module.__dict__[_SITE] = site
        module.__class__ = _adapted_class(type(module))
    site.is_root = site.is_root or is_root
    return site


def detach(module: Module) -> None:
    """Gives the module back its class and its instance-level forward; does nothing if it is not adapted."""
    site = module.__dict__.pop(_SITE, None)
    if site is None:
        return
    module.__class__ = site.base.cls
    if site.base.instance_forward is not None and "forward" not in module.__dict__:
        module.__dict__["forward"] = site.base.instance_forward


def _rebuild(cls: type) -> Any:
    generated = _adapted_class(cls)
    return generated.__new__(generated)


def _adapted_class(cls: type[Module]) -> type[Module]:
    """The generated subclass of a class, one for each, under the class's own name."""
    if cls in _classes:
        return _classes[cls]

    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        site = self.__dict__.get(_SITE)
        # Somebody may have kept this forward from before the removal: it goes on as the plain base.
        return cls.forward(self, *args, **kwargs) if site is None else site.run(args, kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    def reduce_ex(self: Module, protocol: Any) -> Any:
        return _rebuild, (cls,), self.__dict__

    def train(self: Module, mode: bool = True) -> Module:
        return cls.train(self, mode and not self.__dict__[_SITE].frozen_statistics)

    def apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        applied: Module = cls._apply(self, _leaving_in_place(self, fn), recurse)  # type: ignore[no-untyped-call]
        return applied

    names: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "train": train,
        "_apply": apply,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    for fused, flag in _FUSED_PATH_FLAGS.items():
        if issubclass(cls, fused):
            names[flag] = _off_when_adapted(flag)
    if issubclass(cls, Sequential):
        names |= {"__iter__": _iterate_without_adapters, "__len__": _length_without_adapters}
        names["__getitem__"] = _item_without_adapters
    if hasattr(cls, "save_pretrained"):
        names["save_pretrained"] = _refuse_save_pretrained(cls.save_pretrained)
    metaclass: Any = type(cls)
    generated: type[Module] = metaclass(cls.__name__, (cls,), names)
    _classes[cls] = generated
    return generated


def _leaving_in_place(module: Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` for ``_apply``, without its cast for the parameters of this module that train in place."""
    base = module.__dict__[_SITE].base
    if not base.in_place:
        return fn
    parameters = [module.get_parameter(name) for name in base.in_place]
    kept = {id(tensor) for p in parameters for tensor in (p, p.grad) if tensor is not None}

    # What the weights would be cast to if they did not train: `fn` alone tells, tried on a tensor of that dtype.
    computed = fn(torch.empty(0, dtype=base.cast_to or torch.float32)).dtype
    base.cast_to = None if computed == torch.float32 else computed
    move = moved_only(fn)
    return lambda tensor: move(tensor) if id(tensor) in kept else fn(tensor)


def _off_when_adapted(flag: str) -> property:
    def read(self: Module) -> Any:
        site = self.__dict__.get(_SITE)
        return False if site is not None and site.off_fused_path else self.__dict__[flag]

    def write(self: Module, value: Any) -> None:
        self.__dict__[flag] = value

    return property(read, write)


def _children_without_adapters(self: Sequential) -> dict[str, Module]:
    return {n: m for n, m in self._modules.items() if m is not None and not isinstance(m, Adapters)}


def _iterate_without_adapters(self: Sequential) -> Iterator[Module]:
    return iter(_children_without_adapters(self).values())


def _length_without_adapters(self: Sequential) -> int:
    return len(_children_without_adapters(self))


def _item_without_adapters(self: Sequential, index: int | slice) -> Module:
    modules = list(_children_without_adapters(self).values())
    return Sequential(*modules[index]) if isinstance(index, slice) else modules[index]


def _refuse_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self._modules.get("adapters"), Adapters):
            return original(self, *args, **kwargs)
        raise RuntimeError(
            "save_pretrained() on an adapted model would write names that from_pretrained() ignores, and the "
            "bare base would come back. Call adapter.save(folder) for the adapter, or "
            "adapter.merge_and_unload().save_pretrained(folder) for a merged model"
        )

    return save_pretrained
