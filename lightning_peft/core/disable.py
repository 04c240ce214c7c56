"""The base itself, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module, Parameter

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.inject import base_tensors, kept_originals
from lightning_peft.core.merge import unmerged
from lightning_peft.core.routing import Routing


@contextmanager
def disabled(model: Module) -> Iterator[None]:
    """Makes the model the base: no adapter runs, merged ones are taken out, trained base parameters are swapped.

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
    trees = adapters.trees
    originals = [item for t in trees.values() for item in kept_originals(t, "disabled()").items()]
    active = adapters.switch.active
    with unmerged(model), adapters.switch.pinned(Routing(())):
        tensors = base_tensors(model)
        trained = {n: tensors[n].data for n, _ in originals}
        adapters.switch.active = ()
        for name, value in originals:
            # statistics move in training mode, and what is kept must not move with them
            tensors[name].data = value if isinstance(tensors[name], Parameter) else value.clone()
        try:
            yield
        finally:
            for name, value in trained.items():
                tensors[name].data = value
            adapters.switch.active = active
