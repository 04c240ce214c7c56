"""The base itself, for as long as a ``with`` block lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch.nn import Module, Parameter

from lightning_peft.core.adapters import Adapters, adapters_of
from lightning_peft.core.in_place import base_tensors, kept_originals
from lightning_peft.core.merge import unmerged
from lightning_peft.core.routing import Routing


@dataclass
class _Swap:
    """What gives a model back its adapters, and how many blocks are still in its base."""

    back: ExitStack
    blocks: int = 0


_lock = threading.Lock()
# beside the adapters, not in them: a copy of a model that is made inside a block is in no block
_swaps: WeakKeyDictionary[Adapters, _Swap] = WeakKeyDictionary()


@contextmanager
def disabled(model: Module) -> Iterator[None]:
    """Makes the model the base: no adapter runs, merged ones are taken out, trained base parameters are swapped.

    Blocks may lie in each other, and in several threads at once: the first makes it the base, the last one that ends
    gives back what was there before the first.

    Args:
        model: the root.

    Yields:
        Nothing; on leaving, the earlier state is back, an error in the block included.

    Raises:
        RuntimeError: if a method trained the base in place, or an adapter was merged, and kept no originals.
    """
    adapters = adapters_of(model)
    if adapters is None:
        raise RuntimeError("the model is not adapted")
    with _lock:
        swap = _swaps.get(adapters)
        if swap is None:
            with ExitStack() as back:
                back.enter_context(_swapped(model, adapters))
                swap = _swaps[adapters] = _Swap(back.pop_all())
        swap.blocks += 1
    try:
        with adapters.switch.pinned(Routing(())):
            yield
    finally:
        with _lock:
            swap.blocks -= 1
            if not swap.blocks:
                del _swaps[adapters]
                swap.back.close()


@contextmanager
def _swapped(model: Module, adapters: Adapters) -> Iterator[None]:
    originals = [item for t in adapters.trees.values() for item in kept_originals(t, "disabled()").items()]
    active = adapters.switch.active
    with unmerged(model):
        tensors = base_tensors(model)
        trained = {n: tensors[n].data for n, _ in originals}
        adapters.switch.active = ()
        for name, value in originals:
            here = value.to(tensors[name].device)  # the model may have moved since
            # statistics move in training mode, and what is kept must not move with them
            tensors[name].data = here if isinstance(tensors[name], Parameter) else here.clone()
        try:
            yield
        finally:
            for name, value in trained.items():
                tensors[name].data = value
            adapters.switch.active = active
