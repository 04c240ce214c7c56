"""The base's weights as adapters change them, computed beside the model, which is left as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapters import Adapters
from lightning_peft.core.layer import device_for
from lightning_peft.core.quantized import Rounding, dequantized, is_quantized, numbers, requantized
from lightning_peft.core.tree import AdapterTree
from lightning_peft.core.view import with_tensors


def changed_weights(
    model: Module, adapters: Adapters, names: Sequence[str], places: Iterable[str], rounding: Rounding
) -> Iterator[tuple[str, Tensor]]:
    """The weights at some places as these adapters change them, by name.

    Args:
        model: the root.
        adapters: its adapters.
        names: those whose changes count, in their order.
        places: names of modules.
        rounding: is told what quantizing the sums again loses.

    Raises:
        ValueError: if a method is no change of weights, a weight trains in place or cannot be read, or a value is not
            finite.
    """
    in_place = {id(model.get_parameter(n)) for n in adapters.in_place}
    made: dict[int, list[Parameter]] = {}
    for place in places:
        module = model.get_submodule(place)
        trees = [adapters.trees[n] for n in names if place in adapters.trees[n].layers_by_module]
        if not trees:
            continue
        now = dict(module.named_parameters(remove_duplicate=False)) if place else {}
        start = {k: cast(Parameter, adapters.originals.get(joined(place, k), p)) for k, p in now.items()}
        for key, total in _sum(place, module, trees, now, start).items():
            if id(now[key]) in in_place:
                raise ValueError(f"{joined(place, key)} trains in place, so nothing can be merged into it")
            value = total if is_quantized(start[key]) else total.to(now[key].dtype)
            if not torch.isfinite(value).all():
                raise ValueError(f"the merged {joined(place, key)} is not finite; the base is left as it is")
            if is_quantized(start[key]):
                codes = requantized(total, start[key])
                rounding.note(joined(place, key), _numbers(module, key, start, now), total, dequantized(module, codes))
                yield joined(place, key), _in_place_of(start[key], codes)
                continue
            # where both ends of a tie change alike it stays one
            known = made.setdefault(id(start[key]), [])
            if not any(torch.equal(value, p) for p in known):
                known.append(_in_place_of(start[key], value))
            yield joined(place, key), next(p for p in known if torch.equal(value, p))
        if place:
            statistics = dict(module.named_buffers())
            for key, buffer in {k: b for t in trees for k, b in t.layers_by_module[place].replaced().items()}.items():
                yield joined(place, key), buffer.clone().to(statistics[key].dtype)


@torch.no_grad()
def _sum(
    place: str, module: Module, trees: Sequence[AdapterTree], now: dict[str, Parameter], start: dict[str, Parameter]
) -> dict[str, Tensor]:
    """The parameters of one module that change, in float32 or wider."""
    # one that cannot be read, such as one that is offloaded, goes through as it is and is refused if it changes
    wide = {k for k, p in start.items() if p.is_floating_point() and p.itemsize > 1 and not now[k].is_meta}
    readable = [k for k, p in start.items() if is_quantized(p) or k in wide]
    weights = {k: _numbers(module, k, start, now) for k in readable}
    changed: dict[str, Tensor] = {}
    for tree in trees:
        # merged inside a training step, 16-bit precision would otherwise round the product of the factors
        with torch.autocast(device_for(module).type, enabled=False):
            deltas = tree.layers_by_module[place].deltas(with_tensors(module, weights))
        if deltas is None:
            method, where = tree.record.method, f" at {place!r}" if tree.record.method.mergeable else ""
            raise ValueError(
                f"{type(method).__name__}{where} is no change of weights, so it cannot be merged; export the adapter "
                "instead"
            )
        for key, delta in deltas.items():
            if key not in weights:
                raise ValueError(
                    f"{joined(place, key)} cannot be merged into: it is offloaded, quantized or computed from other "
                    "parameters; load the model as it is, in memory, and merge there"
                )
            if not torch.isfinite(delta).all():
                raise ValueError(
                    f"the adapter's change of {joined(place, key)} is not finite; the base is left as it is"
                )
            weights[key] = changed[key] = weights[key] + delta.to(weights[key].device)
    return changed


def _numbers(module: Module, key: str, start: dict[str, Parameter], now: dict[str, Parameter]) -> Tensor:
    """A parameter before adapters changed it, in float32 or wider, where the one now is."""
    return numbers(module.get_submodule(key.rpartition(".")[0]), start[key]).to(now[key].device)


def _in_place_of(original: Parameter, value: Tensor) -> Parameter:
    """A parameter with what was noted on the original, such as that it came from a checkpoint."""
    new = value if isinstance(value, Parameter) else Parameter(value, requires_grad=False)
    # codes come with notes of their own on how to read them
    new.__dict__.update({**original.__dict__, **new.__dict__})
    return new


def joined(place: str, key: str) -> str:
    """A parameter's name, given its module's and its own in that.

    Args:
        place: the module's; ``""`` for the root.
        key: the parameter's.
    """
    return f"{place}.{key}" if place else key
