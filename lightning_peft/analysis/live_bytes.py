"""The memory of tensors, counted while they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512  # bytes: CUDA's allocator of torch gives no less, and multiples of it


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which the bytes of all tensors are counted that an operator makes, until nobody holds them.

    Views count once, with what they look at. What an operator takes for itself alone is not seen. Tensors without
    numbers count as those with numbers would.

    Args:
        last: the size of a last dimension, such as a vocabulary's, whose tensors are counted apart too.

    Attributes:
        now: bytes that are held.
        peak: the most that were held at a time since `restart`.
        last_at_peak: of those at the peak, the bytes of tensors whose last dimension has the size ``last``.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.last = last
        self.now = self.peak = self.last_now = self.last_at_peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int, bool]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors that were there before.

        Args:
            tensors: any; those that are counted already count no second time.

        Returns:
            The bytes that they add.
        """
        before = self.now
        for tensor in tensors:
            self._add(tensor)
        return self.now - before

    def restart(self) -> None:
        """Forgets the peak: it is what is held now."""
        self.peak, self.last_at_peak = self.now, self.last_now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self._add(tensor, counted_apart=tensor.shape[-1:] == (self.last,))
        return given

    def _add(self, tensor: Tensor, *, counted_apart: bool = False) -> None:
        if tensor.is_meta and not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        count = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._held[key] = weakref.ref(storage, lambda _: self._drop(key)), count, counted_apart
        self.now += count
        self.last_now += count if counted_apart else 0
        if self.now > self.peak:
            self.restart()

    def _drop(self, key: int) -> None:
        _, count, counted_apart = self._held.pop(key)
        self.now -= count
        self.last_now -= count if counted_apart else 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes that tensors take together.

    Args:
        tensors: any; what several of them look at counts once.
    """
    return LiveBytes().watch(tensors)
