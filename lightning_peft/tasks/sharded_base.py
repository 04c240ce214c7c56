"""A base that is too large for one process: built without weights, and each process reads its shards from the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.fingerprint import renew_digests
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.sharded import is_sharded
from lightning_peft.tasks.weight_files import WeightFiles


def empty(build: Callable[[], Any], folder: str | Path) -> Any:
    """A model whose parameters have shapes and no numbers; its buffers, which are in no file, are computed.

    Args:
        build: makes the model.
        folder: where its weights lie.

    Returns:
        The model, its parameters on the meta device.

    Raises:
        ValueError: if the files do not hold every parameter under its name and with its shape.
    """
    with _parameters_on_meta():
        model = build()
    model.tie_weights()
    files = WeightFiles(folder, model)
    for name, parameter in model.named_parameters():
        stored = files.find(name)
        if stored is None or stored.shape != tuple(parameter.shape):
            there = f"has the shape {stored.shape} there" if stored else "is in no safetensors file"
            raise ValueError(
                f"model.load_in_shards reads each parameter from {folder}, but {name!r} of {tuple(parameter.shape)} "
                f"{there}; leave load_in_shards out, so that each process loads the whole model"
            )
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        stored = files.find(name) if name in kept else None
        if stored is not None:
            buffer.copy_(stored.read())
    return model


@torch.no_grad()
def fill(model: Any, folder: str | Path, device: torch.device) -> None:
    """Reads this process's shards of a sharded model that was built `empty`; the base's fingerprint comes with them.

    Args:
        model: the model, adapted and sharded.
        folder: where its weights lie.
        device: where its shards go.
    """
    files = WeightFiles(folder, model)
    missing = [n for n, p in base_parameters(model).items() if p.is_meta]
    # by _apply, of which FSDP2 learns that its shards are others now
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    parameters = base_parameters(model)
    for name in missing:
        stored = files.find(name)
        assert stored is not None  # as `empty` has seen
        _read_into(parameters[name], stored.read)
    adapters = adapters_of(model)
    assert adapters is not None
    renew_digests(adapters, parameters, missing)


def _read_into(parameter: Parameter, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    if not is_sharded(parameter):
        parameter.copy_(read(()))
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = parameter
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    own = sharded.to_local()
    if own.numel():
        own.copy_(read(tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts parameters on the meta device when a module takes them in; buffers stay, as no file has some of them."""
    register: Any = Module.register_parameter

    def on_meta(module: Module, name: str, parameter: Parameter | None) -> None:
        if parameter is not None:
            parameter = Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Module.register_parameter = register  # type: ignore[method-assign]
