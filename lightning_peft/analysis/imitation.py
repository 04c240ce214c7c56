"""Models without numbers: every tensor has a shape, a dtype and a device, and takes no memory and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

UnknownShape = DynamicOutputShapeException
"""What is raised in a forward pass where numbers decide shapes, such as which tokens an expert gets."""

IMAGE = 224
"""Pixels of an image's side, where a model's configuration does not say."""


class _Guesses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what asks a tensor for its number with zero: no padding on the left, nothing seen of any data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def imitated() -> Iterator[None]:
    """A block in which models are built, adapted and run without numbers: a model of any size, in seconds."""
    guesses: Any = _Guesses
    with FakeTensorMode(allow_non_fake_inputs=True), guesses():
        yield


def inputs_for(model: Module, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """What a Hugging Face model takes, of a size; made up.

    Args:
        model: the model.
        batch: how many examples.
        tokens: how many tokens each has, on both sides of an encoder and a decoder; an image has its own size.

    Returns:
        By name: ``(batch, tokens)`` or ``(batch, channels, height, width)``.

    Raises:
        ValueError: if the model takes neither texts nor images.
    """
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = getattr(config, "image_size", IMAGE)
        height, width = size if isinstance(size, Sequence) else (size, size)
        return {name: torch.zeros(batch, getattr(config, "num_channels", 3), height, width)}
    if name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {name!r}, of which the size of a batch is not known")
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    inputs = {name: ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs
