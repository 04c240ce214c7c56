"""Models without numbers: every tensor has a shape, a dtype and a device, and takes no memory and no arithmetic."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UnknownShape = DynamicOutputShapeException
"""What is raised in a forward pass where numbers decide shapes, such as which tokens an expert gets."""

IMAGE = 224
"""Pixels of an image's side, where a model's configuration does not say."""


class _Guesses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers a question with no, and what asks for a number with zero: nothing was seen of any data.

    What has numbers, such as a batch that was made before, keeps them, and so has all that follows from it alone: masks
    and positions are compared as they are.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than all else together
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(isinstance(t, FakeTensor) for t in tensors) and (tensors or _counts(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].is_floating_point() or args[0].dtype == torch.bool:
                return args[0].is_floating_point() and 0.0
            raise UnknownShape(func)  # a number of tokens, most often
        if func in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **kwargs)


_LONGEST = 2**13  # tokens, of which masks of all pairs still take little
_COUNTING = torch.ops.aten.arange


def _counts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it makes whole numbers in a row, few enough to have them."""
    whole = kwargs.get("dtype") in (None, torch.long, torch.int32) and all(isinstance(n, int) for n in args)
    return func.overloadpacket is _COUNTING and whole and max(args) <= _LONGEST


_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks that have numbers as the places that they mean: how many those are is what a shape hangs on."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


@contextmanager
def imitated() -> Iterator[None]:
    """A block in which models are built, adapted and run without numbers: a model of any size, in seconds.

    What was made in one such block means nothing in another.
    """
    guesses: Any = _Guesses
    with warnings.catch_warnings():
        # a copy of a module asks its tensors for their address, and makes nothing of it
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        log = logging.getLogger("torch._subclasses.fake_tensor")  # what it tells is in the error
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), guesses():
                yield
        finally:
            log.setLevel(level)


@contextmanager
def numbers() -> Iterator[None]:
    """A block within `imitated` in which tensors that are made have numbers, such as a batch's."""
    with unset_fake_temporarily():
        yield


def has_no_numbers(tensor: Any) -> bool:
    """Whether it stands for a tensor of its shape, to count what a model would take.

    Args:
        tensor: any value.
    """
    return isinstance(tensor, FakeTensor)


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
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):  # by which some find the text's end, wherever it stands
        ids[:, 0] = end
    inputs = {name: ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs
