"""Base weights that a quantizer keeps in a few bits: what numbers they stand for, and others in their place.

bitsandbytes' 4-bit and 8-bit weights and torchao's weight-only ones are known; their packages are imported where such a
weight exists, so they are there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module, Parameter


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a tensor's memory holds codes of a quantizer, not the numbers that they stand for.

    Args:
        weight: any tensor. bitsandbytes' parameters hold plain numbers until they are moved to a device.
    """
    return weight is not None and type(weight) is not Parameter and _kind(weight) is not None


def numbers(module: Module, weight: Tensor) -> Tensor:
    """What a weight of a module says, whether it is quantized or not: in float32, or in what it is if that is wider.

    Args:
        module: the one that computes with it.
        weight: the weight, of a floating-point dtype or quantized.

    Returns:
        The numbers without a gradient; the weight's own memory where that holds them.
    """
    if is_quantized(weight):
        return dequantized(module, weight)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def dequantized(module: Module, weight: Tensor) -> Tensor:
    """The numbers that a module's quantized weight stands for, in float32.

    Args:
        module: the one that computes with it; the scales of bitsandbytes' 8-bit weights lie there after a forward.
        weight: the weight, ``(out, in)`` whatever the shape of its codes.
    """
    kind = _kind(weight)
    known = cast(Any, weight)
    if kind == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, known.quant_state).float()
    if kind == "8bit":
        return weight.data.float() * (_scales(module, weight) / 127).unsqueeze(1)
    return cast(Tensor, known.dequantize()).detach().float()


def note_full(weight: Tensor, read: Callable[[], Tensor]) -> None:
    """Notes on a quantized weight how to get what it was before.

    Args:
        weight: the weight.
        read: gives the numbers, ``(out, in)``.
    """
    cast(Any, weight).read_full = read


def full_weight(weight: Tensor) -> Tensor | None:
    """What a quantized weight was before, in float32; None where nobody knows.

    Args:
        weight: the weight.
    """
    read: Callable[[], Tensor] | None = getattr(weight, "read_full", None)
    return None if read is None else read().to(weight.device, torch.float32)


def codes(weight: Tensor) -> Tensor:
    """What lies in memory for a weight: its numbers, or a quantizer's codes.

    Args:
        weight: any parameter.

    Returns:
        The weight itself, if it is a plain one.
    """
    if type(weight) is Parameter:
        return weight
    if _kind(weight) == "torchao":
        known = cast(Any, weight)
        return cast(Tensor, getattr(known, known.tensor_data_names[0]))
    return weight.detach().as_subclass(Tensor)


def number_of(weight: Tensor) -> int:
    """How many numbers a weight stands for.

    Args:
        weight: any tensor; two of bitsandbytes' 4-bit codes lie in a byte.
    """
    return int(cast(Any, weight).quant_state.shape.numel()) if _kind(weight) == "4bit" else weight.numel()


def memory(weight: Tensor) -> int:
    """How many bytes a weight takes, a quantizer's scales apart.

    Args:
        weight: any tensor.
    """
    held = codes(weight)
    return held.numel() * held.element_size()


def scales(weight: Tensor) -> list[Tensor]:
    """The tensors that bitsandbytes' 4-bit weights have beside their codes; of other weights none.

    Args:
        weight: any tensor.
    """
    if _kind(weight) != "4bit":
        return []
    state = cast(Any, weight).quant_state
    found = [state.absmax, state.code, state.offset]
    found += [state.state2.absmax, state.state2.code] if state.nested else []
    return [tensor for tensor in found if tensor is not None]


def requantized(value: Tensor, like: Tensor) -> Parameter:
    """A weight of the same kind for other numbers: quantized as that one was.

    Args:
        value: the numbers, ``(out, in)``, on the device where the weight is to be.
        like: the quantized weight that it is to stand in for; it is left as it is, and may be on another device.

    Raises:
        ValueError: if its quantizer is none that can be run again from the weight alone.
    """
    kind = _kind(like)
    known = cast(Any, like)
    if kind == "4bit":
        made = type(known)(
            value.cpu().to(known.quant_state.dtype),
            blocksize=known.blocksize,
            compress_statistics=known.compress_statistics,
            quant_type=known.quant_type,
            quant_storage=known.quant_storage,
        )
        return cast(Parameter, made.to(value.device))
    if kind == "8bit":
        return cast(Parameter, type(known)(value.cpu(), requires_grad=False).to(value.device))
    return Parameter(_from_torchao(value.to(like.dtype), known), requires_grad=False)


def move(weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a weight that a model does not hold, which stays the same object: codes with their scales.

    Args:
        weight: the weight.
        device: where to.
        dtype: what to cast to; codes of bitsandbytes stay what they are.
    """
    kind = _kind(weight)
    if kind == "torchao":
        notes = dict(weight.__dict__)
        # .data of such a tensor would say that it moved, and leave the codes where they are
        moved = Parameter(weight.to(device, dtype), requires_grad=False)
        torch.utils.swap_tensors(weight, moved)  # type: ignore[no-untyped-call]
        weight.__dict__.update({**notes, **weight.__dict__})
        return
    weight.data = weight.data.to(device, weight.dtype if kind else dtype)
    known = cast(Any, weight)
    if kind == "4bit":
        known.quant_state.to(device)
    if kind == "8bit" and known.SCB is not None:
        known.SCB = known.SCB.to(device)


def keep_codes(modules: Iterable[Module]) -> None:
    """Keeps bitsandbytes' 4-bit weights in the order in which they can be trained through and read.

    On CPUs with AVX512-BF16 a layer puts its codes into another order at the first evaluation, for good, and gives no
    gradient to its input any more.

    Args:
        modules: the base's.
    """
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
            weight = cast(Any, module.weight)
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as in_order

                weight.data, weight.quant_state = in_order(weight.data, weight.quant_state)


def take_place(module: Module, old: Tensor, new: Tensor) -> None:
    """Makes a module read another weight's codes from now on.

    bitsandbytes' 8-bit layers note codes and scales on themselves at the first forward: the old weight gets its scales
    back, so that it can return, and the new one is to be noted.

    Args:
        module: the module.
        old: the weight that it had.
        new: the weight that it has now.
    """
    if _kind(old) == "8bit":
        cast(Any, old).SCB = _scales(module, old)
    if _kind(new) == "8bit":
        cast(Any, new).CB = new.data


def refuse_training(method: str, name: str, parameter: Tensor) -> None:
    """Refuses to train codes, which have no gradient.

    Args:
        method: the method's name.
        name: the parameter's.
        parameter: the parameter.

    Raises:
        ValueError: if it is quantized.
    """
    if is_quantized(parameter):
        raise ValueError(
            f"{method}: {name!r} is quantized ({type(parameter).__name__}) and cannot train itself; train layers "
            "beside it, such as LoRA's, choose other parameters, or load the model without quantization"
        )


class Rounding:
    """What quantizing merged weights again loses, over all of them and for the worst.

    A change that is smaller than the steps between a quantizer's values is lost in part: see QLoRA (arXiv 2305.14314)
    for why adapters are usually kept beside a quantized base, or merged into the one that it was made from.
    """

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float, float]] = {}

    def note(self, name: str, before: Tensor, wanted: Tensor, got: Tensor) -> None:
        """Notes one weight.

        Args:
            name: the parameter's.
            before: what the weight was.
            wanted: what it was to become.
            got: what it has become.
        """
        parts = (got - wanted, wanted - before, wanted)
        error, change, size = (float(part.double().square().sum()) for part in parts)
        self._squares[name] = error, change, size

    def warn(self, *, bound: bool) -> None:
        """Says by how much the merged weights are off, relative to what the adapter changes and to themselves.

        Args:
            bound: whether the adapter fits these codes alone.
        """
        if not self._squares:
            return
        error, change, size = (sum(column) for column in zip(*self._squares.values(), strict=True))
        worst = max(self._squares, key=lambda n: self._squares[n][0] / max(self._squares[n][1], 1e-30))
        warnings.warn(
            f"{len(self._squares)} merged weights are quantized again, which rounds them: they are off by "
            f"{_share(error, size)} of their size, which is {_share(error, change)} of the adapter's change (most at "
            f"{worst!r}: {_share(*self._squares[worst][:2])}). To lose nothing, "
            + (
                "keep the adapter beside the base: it holds what quantizing that has lost"
                if bound
                else "load the base without quantization (model.quantization=null) and merge there"
            ),
            stacklevel=2,
        )


def _share(part: float, whole: float) -> str:
    """The ratio of two norms, given their squares."""
    return f"{(part / whole) ** 0.5:.2%}" if whole else "all"


def _kind(weight: Tensor) -> str | None:
    for cls in type(weight).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "bitsandbytes" and cls.__name__ == "Params4bit":
            return "4bit" if cast(Any, weight).bnb_quantized else None
        if package == "bitsandbytes" and cls.__name__ == "Int8Params":
            return "8bit" if weight.dtype == torch.int8 else None
        if package == "torchao":
            return "torchao"
    # a parameter without numbers cannot be of a class of its own
    return "4bit" if isinstance(weight, FakeTensor) and hasattr(weight, "quant_state") else None


def _scales(module: Any, weight: Any) -> Tensor:
    """The largest absolute value of each row, which stands for 127."""
    own: Tensor | None = weight.SCB
    return cast(Tensor, module.state.SCB) if own is None else own


def _from_torchao(value: Tensor, like: Any) -> Tensor:
    """Torchao's tensors know how many weights share a scale, but not by which configuration they were made."""
    kind = type(like)
    rounds_inputs = getattr(like, "act_quant_kwargs", None) or getattr(like, "activation_quantization", None)
    if kind.__name__ == "Int8Tensor" and not rounds_inputs:
        from torchao.quantization import PerGroup, PerRow, PerTensor

        rows, columns = like.block_size
        shared = PerTensor() if rows > 1 else PerRow() if columns == value.shape[1] else PerGroup(columns)
        return cast(Tensor, kind.from_hp(value, shared))
    if kind.__name__ == "IntxUnpackedToInt8Tensor" and not rounds_inputs:
        from torchao.quantization.quant_primitives import MappingType

        symmetric = not bool(torch.any(like.zero_point != 0))
        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        return cast(Tensor, kind.from_hp(value, like.block_size, like.target_dtype, mapping_type=mapping))
    raise ValueError(
        f"a weight of torchao's {kind.__name__}{' with quantized inputs' if rounds_inputs else ''} cannot be quantized "
        "again from what it says of itself; load the model without quantization, and merge there"
    )
