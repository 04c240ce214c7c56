"""Python's collector of garbage, which has nothing to find while a model is being adapted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """A block, or decorated function, in which objects that refer to each other are not looked for.

    The collector comes back each time that so many more objects are there than before. Thousands of layers are made
    at once here and all of them stay, so looking through all that was made before, again and again, takes a third of
    the time and frees nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
