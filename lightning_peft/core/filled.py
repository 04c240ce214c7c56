"""Layers that are about to be filled with saved numbers: what they would start from is not looked at then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_later: ContextVar[bool] = ContextVar("_later", default=False)


@contextmanager
def filled_later() -> Iterator[None]:
    """A ``with`` block to place a saved method's layers in.

    A file says of an adapter what it started from: a text and a tokenizer, or tensors that were trained before. They
    lie wherever the file says, and what is in them would be overwritten at once.
    """
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def are_filled_later() -> bool:
    """Whether the layers that are made here get their numbers from a file, so that any will do until then."""
    return _later.get()
