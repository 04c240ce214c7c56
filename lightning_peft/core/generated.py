"""The class that an adapted module gets: its own, with a forward that runs through the module's site."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Sequential, TransformerEncoder, TransformerEncoderLayer

from lightning_peft.core.adapters import Adapters
from lightning_peft.core.layer import moved_only

T = TypeVar("T", bound=Module)

SITE = "_peft_site"
_classes: dict[type, type] = {}

# torch's fused encoder path reads all weights of the layers below and calls none of them. Each of these
# attributes, when false, keeps a module of that class off it.
_FUSED_PATH_FLAGS: dict[type, str] = {
    TransformerEncoderLayer: "activation_relu_or_gelu",
    TransformerEncoder: "use_nested_tensor",
}


def _rebuild(cls: type) -> Any:
    return object.__new__(adapted_class(cls))


def adapted_class(cls: type[Module]) -> type[Module]:
    """The generated subclass of a class, one for each, under the class's own name.

    Args:
        cls: the module's class.
    """
    if cls in _classes:
        return _classes[cls]

    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        site = self.__dict__.get(SITE)
        # Somebody may have kept this forward from before the removal: it goes on as the plain base.
        return cls.forward(self, *args, **kwargs) if site is None else site.run(args, kwargs)

    def new(kind: type, *args: Any, **kwargs: Any) -> Any:
        # type(model).from_pretrained(...) and the like: only what is adapted has this class
        return cls(*args, **kwargs) if kind is generated else object.__new__(kind)

    new.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    def reduce_ex(self: Module, protocol: Any) -> Any:
        return _rebuild, (cls,), self.__dict__

    def train(self: Module, mode: bool = True) -> Module:
        return cls.train(self, mode and not self.__dict__[SITE].frozen_statistics)

    def apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        applied: Module = cls._apply(self, _leaving_in_place(self, fn), recurse)  # type: ignore[no-untyped-call]
        return applied

    names: dict[str, Any] = {
        "__new__": new,
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "train": train,
        "_apply": apply,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: Any = type(cls)
    generated: type[Module] = metaclass(cls.__name__, (cls,), names | _for_kind(cls))
    _classes[cls] = generated
    return generated


def _for_kind(cls: type[Module]) -> dict[str, Any]:
    """What some kinds of modules have to do otherwise when they are adapted."""
    names: dict[str, Any] = {f: _off_when_adapted(f) for kind, f in _FUSED_PATH_FLAGS.items() if issubclass(cls, kind)}
    if issubclass(cls, Sequential):
        names |= {"__iter__": _iterate_without_adapters, "__len__": _length_without_adapters}
        names["__getitem__"] = _item_without_adapters
    if hasattr(cls, "save_pretrained"):
        names["save_pretrained"] = _refuse_save_pretrained(cls.save_pretrained)
    if hasattr(cls, "generate"):
        names["generate"] = _with_the_same_adapters(cls.generate)
    return names


def original_class(cls: type[T]) -> type[T]:
    """The class that a generated one was made for; any other class as it is.

    Args:
        cls: the class, such as ``type(model)``.
    """
    return next((original for original, generated in _classes.items() if generated is cls), cls)


def _leaving_in_place(module: Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` for ``_apply``, without its cast for the parameters of this module that train in place."""
    base = module.__dict__[SITE].base
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
        site = self.__dict__.get(SITE)
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


def _with_the_same_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """A text is written by many forwards, and another thread may change the active adapters between two."""

    @functools.wraps(original)
    def generate(self: Module, *args: Any, **kwargs: Any) -> Any:
        adapters = self._modules.get("adapters")
        if not isinstance(adapters, Adapters):
            return original(self, *args, **kwargs)
        with adapters.switch.pinned():
            return original(self, *args, **kwargs)

    return generate


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
