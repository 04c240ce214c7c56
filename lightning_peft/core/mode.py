"""Evaluation mode, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """Puts a module and all in it into evaluation mode, and each part back into its own afterwards.

    Args:
        module: the module.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
