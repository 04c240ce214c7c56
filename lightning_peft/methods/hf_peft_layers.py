"""A layer of Hugging Face PEFT as an adapter layer: it runs around a module instead of wrapping it."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.base import Base, compute_dtype
from lightning_peft.core.generated import SITE
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import class_of
from lightning_peft.core.twin import bare_twin
from lightning_peft.core.view import with_tensors
from lightning_peft.methods.linear import module_below

PEFT_NAME = "default"
"""The name of the adapter inside PEFT's layers; ours stands above them."""


class _Call:
    """One run of a PEFT layer: the base that it was given, the input's dtype, and whether the layer called the base.

    Attributes:
        module: the module behind the base, with the weights that the layers below make: DoRA reads them.
    """

    def __init__(self, base: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.base = base
        self.dtype = args[0].dtype if args and isinstance(args[0], Tensor) else None
        self.reached = False

    @functools.cached_property
    def module(self) -> Module:
        return module_below(self.base)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the base; an input that PEFT has cast for its own tensors is cast back."""
        self.reached = True
        if self.dtype is not None and args and args[0].dtype != self.dtype:
            args = (args[0].to(self.dtype), *args[1:])
        return self.base(*args, **kwargs)


# The running call, and not an attribute of the layer: threads that share the model each have their own
_call: ContextVar[_Call] = ContextVar("lightning_peft_call")
_task_ids: ContextVar[Tensor | None] = ContextVar("lightning_peft_task_ids", default=None)
_classes: dict[type, type] = {}


class PeftLayer(AdapterLayer):
    """A PEFT layer whose wrapped module is a stand-in that leads to ``base``.

    The parameters, buffers and children are the PEFT layer's own, so they lie in the adapter under PEFT's names.

    Args:
        layer: the PEFT layer, wrapped around a twin of the module.
        socket: the name under which it holds what it wraps.
        module: the module itself.
        file_names: for each of the layer's tensors its name in a PEFT file, or None where PEFT's files lack it.
        in_base_dtype: whether PEFT's code counts on parameters in the base's dtype.
        takes_task_ids: whether the layer is told which task each example is of.
    """

    def __init__(
        self,
        layer: Module,
        socket: str,
        module: Module,
        file_names: dict[str, str | None],
        *,
        in_base_dtype: bool = False,
        takes_task_ids: bool = False,
    ) -> None:
        super().__init__()
        del layer._modules[socket]
        # straight into the dictionary: an attribute that is a module would be registered
        layer.__dict__[socket] = _stand_in(module)
        self._parameters = layer._parameters
        self._buffers = layer._buffers
        self._modules = layer._modules
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set
        self._layer: tuple[Any] = (layer,)
        self.socket = socket
        self.file_names = file_names
        self.in_base_dtype = in_base_dtype
        self.takes_task_ids = takes_task_ids
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        self._let_go_of_hooks()
        self.train(module.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        (layer,) = self._layer
        # neither a copy of a parameter nor a pickled one keeps the hooks by which a layer turns its gradient
        if hasattr(layer, "_attach_hooks"):
            layer._attach_hooks(PEFT_NAME)
            self._let_go_of_hooks()

    def _let_go_of_hooks(self) -> None:
        """Drops a layer's handles of its hooks, which stay: they cannot be pickled, and a copy's would remove ours."""
        layer: Any = self._layer[0]
        if hasattr(layer, "hook_handles"):
            layer.hook_handles = []

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs PEFT's forward.

        Raises:
            RuntimeError: if PEFT computes with the weights alone and so would pass over another active adapter.
        """
        (layer,) = self._layer
        layer.training = self.training
        wanted = compute_dtype(base) if self.in_base_dtype else None
        casts = {n: p.to(wanted) for n, p in layer.named_parameters() if wanted and p.dtype != wanted}
        call = _Call(base, args)
        token = _call.set(call)
        try:
            if self.takes_task_ids:
                kwargs["task_ids"] = task_ids_of_call()
            output = (with_tensors(layer, casts) if casts else layer)(*args, **kwargs)
        finally:
            _call.reset(token)
        if not call.reached and not isinstance(base, Base):
            raise RuntimeError(
                f"{type(layer).__name__} of peft computes with the weights and never calls the module, so the other "
                "active adapter there would be passed over; activate one of the two"
            )
        return output

    def deltas(self, module: Module) -> dict[str, Tensor] | None:
        """What PEFT's own merging does to a float32 copy of the module.

        Raises:
            ValueError: if PEFT refuses for this module, such as a bias on one that has none.
        """
        (layer,) = self._layer
        plain = copy.deepcopy(bare_twin(module)).float()
        before = {n: p.detach().clone() for n, p in plain.named_parameters()}
        twin: Any = copy.deepcopy(layer)
        del twin.__dict__[self.socket]
        twin._modules[self.socket] = plain
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin.merge(adapter_names=[PEFT_NAME])
        except (AttributeError, NotImplementedError, TypeError):
            return None  # not every layer has a merge, and some only say that they have none
        except ValueError as error:
            raise ValueError(f"the layer at hand cannot be merged: peft says: {error}") from error
        merged = dict(twin.get_submodule(self.socket).named_parameters())
        if merged.keys() != before.keys():
            return None
        return {n: merged[n].detach() - before[n] for n in before if merged[n].is_floating_point()}


def task_ids_of_call() -> Tensor | None:
    """The ``task_ids`` of the running call, ``(batch)``."""
    return _task_ids.get()


class TaskIds(AdapterLayer):
    """On the whole model: takes the argument ``task_ids``, ``(batch)``, out of a call and hands it to the layers.

    Args:
        inner: a layer without tensors that runs at the same place.
    """

    def __init__(self, inner: AdapterLayer | None = None) -> None:
        super().__init__()
        self._inner = (inner,)

    def forward(self, base: Callable[..., Any], *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Runs the model, through the inner layer where there is one."""
        (inner,) = self._inner
        token = _task_ids.set(task_ids)
        try:
            return base(*args, **kwargs) if inner is None else inner(base, *args, **kwargs)
        finally:
            _task_ids.reset(token)

    def deltas(self, module: Module) -> dict[str, Tensor] | None:
        """Nothing of its own: the ids act through the layers."""
        (inner,) = self._inner
        return {} if inner is None else inner.deltas(module)


def _stand_in(module: Module) -> Module:
    """An object of the module's class without tensors: called it runs the base, asked it answers for the module."""
    cls = class_of(module)
    made: Module = object.__new__(_stand_in_class(cls))
    plain = {k: v for k, v in module.__dict__.items() if k not in (SITE, "forward")}
    made.__dict__ |= {**plain, **Module().__dict__}
    return made


def _rebuild(cls: type[Module]) -> Module:
    made: Module = object.__new__(_stand_in_class(cls))
    return made


def _stand_in_class(cls: type[Module]) -> type[Module]:
    if cls in _classes:
        return _classes[cls]

    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        return _call.get().run(args, kwargs)

    def get(self: Module, name: str) -> Any:
        call = _call.get(None)
        if call is None:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r} outside a forward")
        return getattr(call.module, name)

    def reduce_ex(self: Module, protocol: Any) -> Any:
        return _rebuild, (cls,), self.__dict__

    metaclass: Any = type(cls)
    names = {"forward": forward, "__getattr__": get, "__reduce_ex__": reduce_ex, "__module__": cls.__module__}
    generated: type[Module] = metaclass(cls.__name__, (cls,), names)
    _classes[cls] = generated
    return generated
