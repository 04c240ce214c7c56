"""A value that holds for one forward of a model: a layer around the whole passes it, the layers inside read it."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_passed = threading.local()
# what the forward passed within an activation checkpoint, for its recomputation: that runs in the backward pass, when
# the forward has ended, and on another thread where the device has threads of its own
_checkpointed: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()


class PerForward(Generic[T]):
    """Passes a value to everything that runs below; each thread has its own, and nothing is written into modules.

    Copies and pickles of a model keep the layers that share one together.
    """

    def __init__(self) -> None:
        self._traced: T | None = None

    @contextmanager
    def passing(self, value: T) -> Iterator[None]:
        """Holds the value until the block ends.

        Args:
            value: what `read` gives inside.
        """
        if torch.compiler.is_compiling():  # a trace follows attributes, not threads; it ends with None again
            self._traced = value
            yield
            self._traced = None
            return
        held: dict[int, tuple[int, Any]] = _passed.__dict__.setdefault("values", {})
        before = held.get(id(self))
        held[id(self)] = (torch._C._current_graph_task_id(), value)
        try:
            yield
        finally:
            if before is None:
                del held[id(self)]
            else:
                held[id(self)] = before

    def read(self) -> T | None:
        """The value of the forward that runs here, or that is run again here; None where none was passed."""
        if torch.compiler.is_compiling():
            return self._traced
        backward = torch._C._current_graph_task_id()
        at, value = _passed.__dict__.get("values", {}).get(id(self), (None, None))
        # within a backward pass only what was passed in it counts: a forward that is run again began elsewhere
        if at == backward:
            checkpoint = _checkpoint() if torch.is_grad_enabled() else None
            if checkpoint is not None:
                _checkpointed.setdefault(checkpoint, {})[id(self)] = value
            return value  # type: ignore[no-any-return]
        checkpoint = _checkpoint()
        return None if checkpoint is None else _checkpointed.get(checkpoint, {}).get(id(self))


def this_forward(*, same_graph: bool = True) -> Callable[[], bool]:
    """Tells later whether the code runs in the thread and the grad mode of now.

    Another thread may be serving the model, and somebody's hook may run it without a graph in between.

    Args:
        same_graph: whether the grad mode counts; not for what is run without a graph in the same forward.
    """
    here, graph = threading.get_ident(), torch.is_grad_enabled()
    return lambda: threading.get_ident() == here and (torch.is_grad_enabled() == graph or not same_graph)


def _checkpoint() -> Any:
    """The activation checkpoint that the code here runs in, the first time or again, or None outside of any.

    Nothing public tells; its hooks on saved tensors hold it, itself at first and weakly when it is run again.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None
    for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
        found = cell.cell_contents
        found = found() if isinstance(found, weakref.ref) else found
        if isinstance(found, torch.utils.checkpoint._CheckpointFrame):
            return found
    return None


labels_of_batch: PerForward[Tensor | None] = PerForward()
"""The labels of a batch whose loss is taken outside the model, passed by whoever takes it."""
