"""Which adapters run and which train: two things, chosen apart from each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.nn import Module

from lightning_peft.core.adapters import Adapters, require_adapters
from lightning_peft.core.in_place import base_tensors
from lightning_peft.core.matching import base_modules
from lightning_peft.core.routing import Routing
from lightning_peft.core.rows import Rows
from lightning_peft.core.statistics import freeze_statistics


def activate(model: Module, *names: str) -> None:
    """Makes the named adapters the active ones; which parameters train stays as it is.

    Where several have a layer at one module, each works on what those named before it give: the first is the
    innermost. What a method trains in place in the base counts whether it is active or not.

    Args:
        model: the root of an adapted model.
        *names: the adapters; none at all leaves the base.

    Raises:
        ValueError: if the model is not adapted, has no such adapter, or one is named twice or is merged.
    """
    adapters = require_adapters(model)
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise ValueError(f"activate names the adapter {twice[0]!r} twice; it would run twice")
    with adapters.switch.changing:
        require_adapters(model, names)
        for name in names:
            _refuse_merged(adapters, name)
        adapters.switch.active = names


def active_adapters(model: Module) -> tuple[str, ...]:
    """The names of the active adapters, the innermost first; merged ones are part of the weights and not listed.

    Args:
        model: the root of an adapted model.

    Raises:
        ValueError: if the model is not adapted.
    """
    return require_adapters(model).switch.active


@contextmanager
def adapter_names(model: Module, names: Sequence[str | None], repeats: int = 1) -> Iterator[None]:
    """A ``with`` block in which each example of a batch runs with an adapter of its own, in this thread.

    Each gets what it gets alone with only that adapter active, whatever is active outside the block. Modules are
    run once for the whole batch, and the layers for their own examples; what cannot be parted so is refused.

    Args:
        model: the root of an adapted model, whose inputs have the examples along dim 0.
        names: an adapter an example, or None for the base.
        repeats: how many consecutive rows an example may have instead of one: ``num_beams``, or
            ``num_return_sequences``, of ``generate()``.

    Yields:
        Nothing.

    Raises:
        ValueError: if the model is not adapted, has no such adapter, one is merged or trains the base in place,
            which all examples share, or a number is out of its range.
        TypeError: if the names are one text.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a list with an adapter for each example, but got {names!r}")
    given = [n for n in dict.fromkeys(names) if n is not None]
    adapters = require_adapters(model)
    if not names or repeats < 1:
        raise ValueError(f"expected a name an example and repeats of 1 or more, but got {list(names)} and {repeats}")
    block = tuple(names)
    with adapters.switch.changing:
        methods = _methods_by_name(model, given)
        adapters.switch.blocks.append(block)
    alone = len(set(names)) == 1
    routing = Routing(tuple(given)) if alone else Routing((), Rows(block, repeats, methods))
    try:
        with adapters.switch.pinned(routing):
            yield
    finally:
        adapters.switch.blocks.remove(block)


def _methods_by_name(model: Module, names: Sequence[str]) -> dict[str, str]:
    """The name of each adapter's method, if all of them can run for some examples only."""
    adapters = require_adapters(model, names)
    for name in names:
        _refuse_merged(adapters, name)
        in_place = adapters.trees[name].record.in_place
        if in_place:
            raise ValueError(
                f"the adapter {name!r} trains {in_place[0]!r} of the base in place, for all examples alike"
            )
    return {name: type(adapters.trees[name].record.method).__name__ for name in names}


def _refuse_merged(adapters: Adapters, name: str) -> None:
    if name in adapters.merged:
        raise ValueError(f"the adapter {name!r} is merged into the weights, so it acts already; unmerge() it first")


def set_trainable(model: Module, name: str, trains: bool) -> None:
    """Tells one adapter to train or to rest; whether it is active stays as it is.

    Args:
        model: the root.
        name: the adapter's name.
        trains: whether its parameters get gradients. Those that did not train before it rested do not after.

    Raises:
        ValueError: if the model has no such adapter.
    """
    adapters = require_adapters(model, [name])
    tree = adapters.trees[name]
    record = tree.record
    if trains == (record.resting is None):
        return
    base = base_tensors(model)
    parameters = {**dict(tree.named_parameters()), **{n: base[n] for n in record.in_place}}
    chosen = record.resting if trains else [n for n, p in parameters.items() if p.requires_grad]
    for key in chosen or ():
        parameters[key].requires_grad_(trains)
    record.resting = None if trains else chosen
    freeze_statistics(model, base_modules(model), adapters)
