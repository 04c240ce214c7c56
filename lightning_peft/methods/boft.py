"""BOFT: an orthogonal matrix out of butterfly factors (Liu et al., arXiv 2311.06243, 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import raise_problems
from lightning_peft.methods.linear import LinearMethod, module_below, near_divisors, oriented, sizes, weight_of
from lightning_peft.methods.oft import cayley, times_blocks


@dataclass(kw_only=True)
class BOFT(LinearMethod):
    """Butterfly orthogonal fine-tuning: ``s * (W R_1 R_2 ... R_m x) + b``, each ``R_i`` of blocks on mixed inputs.

    ``R_i = P_i diag(C_1, ..., C_n) P_i^T`` with ``C`` Cayley's transform of a skew-symmetric matrix, made of
    ``boft_R: (m, n, block, block)`` from zero, and ``P_i`` a permutation that reaches twice as far with each
    factor, so that few small blocks mix all inputs. ``boft_s: (out, 1)`` scales the outputs, from one.

    Args:
        boft_block_size: size of a block; it must divide the number of inputs.
        boft_block_num: number of blocks, given in place of their size; one of the two must be 0.
        boft_n_butterfly_factor: number of factors m; 1 is OFT with a scale. Blocks must be even in size and
            number, and ``2^(m - 1)`` of them must fit, for more than one.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number is out of its range.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    learning_rate: float = 5e-3

    peft_type: ClassVar[str | None] = "BOFT"
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_weights", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        size, number = self.boft_block_size, self.boft_block_num
        raise_problems(
            "BOFT",
            [
                *range_problems(self, counts=["boft_n_butterfly_factor"], positive=["learning_rate"]),
                "one of boft_block_size and boft_block_num must be 1 or more and the other 0, but got "
                f"{size} and {number}"
                if min(size, number) != 0 or max(size, number) < 1
                else None,
            ],
        )

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module.

        Raises:
            ValueError: if the blocks do not divide the module's inputs, or the factors do not fit.
        """
        n_in = sizes(module)[0]
        given = self.boft_block_size or self.boft_block_num
        if n_in % given:
            option = "boft_block_size" if self.boft_block_size else "boft_block_num"
            raise ValueError(
                f"BOFT: {option}={given} must divide the {n_in} inputs of {name!r}; {near_divisors(given, n_in)}"
            )
        size = self.boft_block_size or n_in // given
        number, m = n_in // size, self.boft_n_butterfly_factor
        if m > 1 and (size % 2 or number % 2 ** (m - 1)):
            raise ValueError(
                f"BOFT: boft_n_butterfly_factor={m} needs blocks of even size whose number {2 ** (m - 1)} divides, but "
                f"{name!r} has {number} blocks of {size}"
            )
        return _BoftLayer(module, self, number, size)


class _BoftLayer(AdapterLayer):
    """``s * (base(x R) - b) + b``; x: ``(..., in)``."""

    def __init__(self, module: Module, method: BOFT, number: int, size: int) -> None:
        super().__init__()
        n_out = sizes(module)[1]
        device = device_for(module)
        m = method.boft_n_butterfly_factor
        self.boft_R = Parameter(torch.zeros(m, number, size, size, dtype=torch.float32, device=device))
        self.boft_s = Parameter(torch.ones(n_out, 1, dtype=torch.float32, device=device))

    def rotated(self, rows: Tensor) -> Tensor:
        """Rows times the product of all factors, the last one first; ``(..., in)``."""
        m, number, size, _ = self.boft_R.shape
        rotations = cayley((self.boft_R - self.boft_R.mT) / 2)
        for factor in reversed(range(m)):
            order = butterfly(number * size, size, factor).to(rows.device)
            rows = times_blocks(rows[..., order.argsort()], rotations[factor])[..., order]
        return rows

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        # a rotation rounded to 16 bits is none: it is applied in its own precision, outside autocast too
        with torch.autocast(x.device.type, enabled=False):
            rotated = self.rotated(x.to(self.boft_R.dtype)).to(x.dtype)
        y: Tensor = base(rotated)
        scale = self.boft_s.flatten().to(y.dtype)
        bias = _bias_of(base)
        return y * scale if bias is None else y * scale + bias.to(y.dtype) * (1 - scale)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        weight = weight_of(module).to(self.boft_R.dtype)
        # x M W^T is x (W M^T)^T, and M^T's rows are the rotated rows of the identity, turned
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        changed = self.boft_s * (weight @ self.rotated(eye).T)
        return {"weight": oriented(changed - weight, module)}


def _bias_of(base: Callable[..., Any]) -> Tensor | None:
    bias = getattr(module_below(base), "bias", None)
    return bias if isinstance(bias, Tensor) else None


def butterfly(n: int, size: int, factor: int) -> Tensor:
    """Where each input stands in a butterfly factor: neighbours for the first, twice as far apart for each next.

    Args:
        n: number of inputs.
        size: of a block, even beyond the first factor.
        factor: which one, from 0.

    Returns:
        A permutation, ``(n,)``: within groups of ``size * 2^factor`` the half-blocks of even number come first.
    """
    order = torch.arange(n)
    if factor == 0:
        return order
    return order.reshape(-1, 2**factor, 2, size // 2).transpose(1, 2).reshape(n)
