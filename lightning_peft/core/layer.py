"""What an adapter is made of: layers that run around a module's original forward and own their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Module


def moved_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A tensor function for ``Module._apply`` that takes its device from ``fn`` and leaves the dtype alone.

    Args:
        fn: what ``Module.to``, ``half``, ``bfloat16`` and their kin hand to ``_apply``.

    Returns:
        The same movement without its cast.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


class AdapterLayer(Module):
    """One leaf of an adapter: ``forward(base, *args, **kwargs)`` calls the original forward where it likes.

    Trained parameters stay float32 whatever the base is cast to: a true 16-bit precision plugin converts a
    model *after* its weights were restored, so anything else would be rounded at every resume.

    Attributes:
        divisible: whether the layer may see some examples of a batch and another the others: not where layers of an
            adapter hand something on from one to the next.
        beside: whether the layer gives what its base gives, as it is, and does the rest beside it. What a frozen base
            gave for the same input once may stand in for it then.
        splits: whether the layer can stand on a module that tensor parallelism has split, its own tensors split alike.
    """

    divisible: ClassVar[bool] = True
    splits: ClassVar[bool] = False
    beside: bool = False

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs ``base``, the module's original forward or the next inner layer, and adds to what it gives."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(base, *args, **kwargs)")

    @classmethod
    def together(cls, layers: Sequence[Self | None], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs ``base`` once and adds to each example what its own layer adds; a kind may leave this out.

        Args:
            layers: the layer of each example, None for the base alone. An example may be several rows, one behind the
                other.
            base: the module's original forward.
            *args: the module's inputs for all examples.
            **kwargs: its named inputs.

        Returns:
            What each example gets alone, or ``NotImplemented``, before ``base`` has been called, where these layers
            or inputs have to be run by one adapter after the other.
        """
        return NotImplemented

    def deltas(self, module: Module) -> dict[str, Tensor] | None:
        """What merging would add to the module's parameters.

        Args:
            module: the adapted module.

        Returns:
            Parameter name (dotted, below ``module``) to the float32 change, or None if the layer is no change
            of weights and cannot be merged.
        """
        return None

    def products(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The change that `deltas` gives as thin factors, without making it; a kind whose change is none leaves it out.

        Returns:
            Parameter name to ``A: (..., r, in)`` and ``B: (..., out, r)``, whose product ``B A``, or its transpose, is
            the whole change of that parameter; or None.
        """
        return None

    def index_limits(self) -> dict[str, tuple[int, ...]]:
        """Buffers that say where something is: for each of their rows, how many places there are; -1 is nowhere."""
        return {}

    def replaced(self) -> dict[str, Tensor]:
        """The module's buffers that merging puts others in place of, by dotted name below the module."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        super()._apply(moved_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def device_for(module: Module) -> torch.device:
    """Where an adapter layer for a module belongs: the weights' device, or where offloaded ones are run.

    Args:
        module: the module that gets the layer.
    """
    own = (p for p in module._parameters.values() if p is not None)
    first = next(own, None)  # which most modules that get a layer have; the walk below them costs ten times as much
    if first is None:
        first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":
        # accelerate brings offloaded weights to this device for the length of a forward
        hook = getattr(module, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device
