"""How much memory the layers of a saved adapter may take before its tensors are read: what its file can account for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from lightning_peft.core.filled import filled_later
from lightning_peft.core.method import Method

_DRAWN = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
_LINES = (torch.arange, torch.eye, torch.randperm, torch.linspace)
_FEW = 2**22
"""Numbers that any adapter may have: 16 MiB."""

_USUAL = 16
"""Options up to this number, and shares down to its square's, make no layer large: then nothing is counted."""

_stored: ContextVar[int | None] = ContextVar("_stored", default=None)


@contextmanager
def made_for(stored: int | None) -> Iterator[None]:
    """A ``with`` block in which adapters are made whose numbers come out of a file or a checkpoint.

    `bounded` knows how many it holds, and methods read nothing of what a fresh adapter would start from.

    Args:
        stored: how many; None where that is not known, and then nothing is refused.
    """
    token = _stored.set(stored)
    try:
        with filled_later():
            yield
    finally:
        _stored.reset(token)


@contextmanager
def bounded(model: Module, method: Method) -> Iterator[None]:
    """A ``with`` block to inject in: within `made_for`, more numbers than the file accounts for are refused.

    A method that was written down with a rank of a billion is so refused when the first such tensor is asked for,
    before there is memory for it. Four times what is stored, and four times the base's largest tensor for what follows
    from a seed and for what starts are computed in, is more than any method takes. Counting takes half as long as
    injecting itself, so it is done only where an option is large.

    Args:
        model: the base.
        method: the method, as it was saved.

    Raises:
        ValueError: if layers ask for more.
    """
    stored = _stored.get()
    options = {k: v for k, v in vars(method).items() if k != "learning_rate"}
    if stored is None or _are_usual(options):
        yield
        return
    largest = max((p.numel() for p in model.parameters()), default=0)
    with _Counted(4 * stored + 4 * largest + _FEW):
        yield


def _are_usual(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(_are_usual(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (int, float)) or value == 0 or 1 / _USUAL**2 <= value <= _USUAL


class _Counted(TorchFunctionMode):
    """Counts the numbers of tensors that are made out of nothing."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DRAWN:
            asked = _numel(args)
            self.made += asked
        else:
            asked = int(max([a for a in args if isinstance(a, int)], default=0)) if func in _LINES else 0
        if max(asked, self.made) > self.most:
            raise ValueError(
                f"the adapter's options ask for {max(asked, self.made):,} numbers and more, but its tensors and the "
                f"base account for {self.most:,} at most; the options are not those that it was saved with"
            )
        return func(*args, **(kwargs or {}))


def _numel(args: tuple[Any, ...]) -> int:
    """The number of elements of ``torch.empty(2, 3)`` and ``torch.empty((2, 3))``."""
    shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
    sizes = [s for s in shape if isinstance(s, int)]
    return math.prod(sizes) if sizes and all(s >= 0 for s in sizes) else 0
