"""A module of the base that an adapter trains in full, as a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_peft.core.base import compute_dtype
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.view import with_tensors


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
