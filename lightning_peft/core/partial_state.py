"""Checkpoints that hold what trains: state-dict hooks that leave the untouched base out and do not miss it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from lightning_peft.core.adapters import adapters_of


class PartialState:
    """Hooks on a module whose submodule is adapted; strict loading stays strict for everything that was saved.

    What is kept is never read from ``requires_grad``: every adapter, every base parameter that the method trains, all
    buffers that are there when it is saved, and all that lies outside the adapted submodule.

    Args:
        module: the module that gets saved, such as a LightningModule.
        path: the adapted submodule's name in it; ``""`` if it is the module itself.
    """

    def __init__(self, module: Module, path: str) -> None:
        self.path = path
        self.base = f"{path}." if path else ""
        self._prefix = ""
        # torch marks this hook with an attribute, which a bound method does not take
        module.register_state_dict_post_hook(self)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(self.note_prefix)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(self.forgive)  # type: ignore[no-untyped-call]

    def untouched(self, module: Module, keys: Iterable[str]) -> set[str]:
        """Which keys of the module's state are base parameters that no adapter ever trains.

        Args:
            module: the module that is saved or loaded.
            keys: the keys, without what stands before the module's own names.
        """
        root = module.get_submodule(self.path)
        adapters = adapters_of(root)
        if adapters is None:  # removed, or merged for good: nothing else holds what the base has become
            return set()
        kept = {f"{self.base}{n}" for n in (*adapters.in_place, *(n for n, _ in root.named_buffers()))}
        inside = (k for k in keys if k.startswith(self.base) and not k.startswith(f"{self.base}adapters."))
        return {k for k in inside if k not in kept}

    def __call__(self, module: Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        """Takes the untouched base out of a state dict that is being made."""
        own = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        for key in self.untouched(module, own):
            del state[prefix + key]

    def note_prefix(self, module: Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Keeps what stands before the names, which the hook after loading is not told."""
        self._prefix = prefix

    def forgive(self, module: Module, incompatible: Any) -> None:
        """Takes the untouched base out of the keys that a loaded state dict lacks."""
        missing, prefix = incompatible.missing_keys, self._prefix
        forgiven = self.untouched(module, [k.removeprefix(prefix) for k in missing if k.startswith(prefix)])
        missing[:] = [k for k in missing if not (k.startswith(prefix) and k.removeprefix(prefix) in forgiven)]
