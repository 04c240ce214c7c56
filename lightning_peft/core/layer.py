"""What an adapter is made of: layers that run around a module's original forward and own their dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.view import with_tensors


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
    """

    divisible: ClassVar[bool] = True

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs ``base``, the module's original forward or the next inner layer, and adds to what it gives."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(base, *args, **kwargs)")

    def deltas(self, module: Module) -> dict[str, Tensor] | None:
        """What merging would add to the module's parameters.

        Args:
            module: the adapted module.

        Returns:
            Parameter name (dotted, below ``module``) to the float32 change, or None if the layer is no change
            of weights and cannot be merged.
        """
        return None

    def replaced(self) -> dict[str, Tensor]:
        """The module's buffers that merging puts others in place of, by dotted name below the module."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        super()._apply(moved_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class SavedModule(AdapterLayer):
    """A copy of a whole module that the adapter owns and trains in full; it runs in place of the base's.

    The copy's parameters and children are the layer's own, so they lie in the adapter under their usual names
    (``classifier.weight``).

    Args:
        module: the base's module; it is copied, in float32, and left as it is.
    """

    def __init__(self, module: Module) -> None:
        super().__init__()
        twin = copy.deepcopy(module)
        for tensor in twin.parameters():
            tensor.requires_grad_(True)
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        # The dictionaries are shared, so `.to()` and `load_state_dict` on the layer reach the copy. The tuple
        # keeps the copy itself from being registered, which would put one more name into every key.
        self._parameters = twin._parameters
        self._buffers = twin._buffers
        self._modules = twin._modules
        self._non_persistent_buffers_set = twin._non_persistent_buffers_set
        self._twin = (twin,)
        self.train(module.training)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the copy; a 16-bit base makes its weights be cast, never the activations."""
        (twin,) = self._twin
        twin.training = self.training
        wanted = compute_dtype(base)
        casts = {n: p.to(wanted) for n, p in twin.named_parameters() if wanted and p.dtype != wanted}
        return with_tensors(twin, casts).forward(*args, **kwargs) if casts else twin(*args, **kwargs)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The difference between the copy and the module it stands for."""
        originals = dict(module.named_parameters())
        return {n: p.detach() - originals[n].detach().float() for n, p in self.named_parameters()}

    def replaced(self) -> dict[str, Tensor]:
        """The copy's buffers: running statistics moved while it trained."""
        return dict(self.named_buffers())


def compute_dtype(base: Callable[..., Any]) -> torch.dtype | None:
    """The dtype in which the module behind ``base`` computes: that of its first floating-point parameter.

    Args:
        base: the callable that an adapter layer was given.

    Returns:
        The dtype, or None for a module without floating-point parameters.
    """
    while not hasattr(base, "module"):
        base = base.args[0]  # type: ignore[attr-defined]  # a functools.partial around the next inner layer
    return next((p.dtype for p in base.module.parameters() if p.is_floating_point()), None)


def device_for(module: Module) -> torch.device:
    """Where an adapter layer for a module belongs: the weights' device, or where offloaded ones are run.

    Args:
        module: the module that gets the layer.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        # accelerate brings offloaded weights to this device for the length of a forward
        hook = getattr(module, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device
