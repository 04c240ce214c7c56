"""OFT: a module's input rotated block by block (Qiu et al., arXiv 2306.07280; as in its arXiv 2506.19847)."""

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
from lightning_peft.methods.linear import LinearMethod, near_divisors, oriented, sizes, weight_of


@dataclass(kw_only=True)
class OFT(LinearMethod):
    """Orthogonal fine-tuning: ``W R x`` with ``R = diag(R_1, ..., R_r)`` orthogonal, each ``(block, block)``.

    ``R_i`` is Cayley's transform ``(I - Q)(I + Q)^-1`` of a skew-symmetric ``Q_i``, of which the entries above the
    diagonal are trained, ``oft_R: (r, block (block - 1) / 2)``, from zero. Angles between a module's neurons stay
    what they were.

    Args:
        r: number of blocks; 0 to give the block's size instead.
        oft_block_size: size of a block; it must divide the number of inputs. One of the two must be 0.
        block_share: whether all blocks of a module are one.
        use_cayley_neumann: whether the inverse is replaced by the first terms of its series: faster, and
            orthogonal as nearly as the terms allow.
        num_cayley_neumann_terms: how many terms, 2 or more; 3 are taken as 4, as Hugging Face PEFT does.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number is out of its range.
    """

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    learning_rate: float = 2e-3

    peft_type: ClassVar[str | None] = "OFT"
    # eps belongs to the constrained variant, which is refused
    peft_idle: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "init_weights", "eps", "runtime_config")

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "OFT",
            [
                *range_problems(self, positive=["learning_rate"]),
                f"one of r and oft_block_size must be 1 or more and the other 0, but got r={self.r} and "
                f"oft_block_size={self.oft_block_size}"
                if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) < 1
                else None,
                f"num_cayley_neumann_terms must be 2 or more, but got {self.num_cayley_neumann_terms}"
                if self.num_cayley_neumann_terms < 2
                else None,
            ],
        )

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module."""
        return _OftLayer(module, self)

    def beyond(self, name: str, module: Module) -> str | None:
        """Blocks that do not divide the inputs; PEFT takes the nearest that do, so its files may ask for such."""
        n_in = sizes(module)[0]
        given, number = ("r", self.r) if self.r else ("oft_block_size", self.oft_block_size)
        if n_in % number == 0:
            return None
        return f"{given}={number} must divide the {n_in} inputs of {name!r}; {near_divisors(number, n_in)}"

    def peft_name(self, key: str, model: Module) -> str:
        """PEFT's file has the rotations' entries as the weight of a module ``oft_R``."""
        return f"{super().peft_name(key, model)}.weight" if key.endswith(".oft_R") else super().peft_name(key, model)


class _OftLayer(AdapterLayer):
    """``base(R x)``; x: ``(..., in)``."""

    def __init__(self, module: Module, method: OFT) -> None:
        super().__init__()
        n_in = sizes(module)[0]
        # in what PEFT wrote the number may divide nothing; the nearest divisor, the smaller of two, is meant
        given, divisors = method.r or method.oft_block_size, [d for d in range(1, n_in + 1) if n_in % d == 0]
        number = min(divisors, key=lambda d: abs(d - given))
        self.blocks = number if method.r else n_in // number
        self.size = n_in // self.blocks
        shape = (1 if method.block_share else self.blocks, self.size * (self.size - 1) // 2)
        self.oft_R = Parameter(torch.zeros(shape, dtype=torch.float32, device=device_for(module)))
        self.terms = method.num_cayley_neumann_terms if method.use_cayley_neumann else None

    def rotations(self) -> Tensor:
        """The blocks that the input's rows are multiplied with, ``(blocks or 1, size, size)``."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.oft_R.device)
        upper = self.oft_R.new_zeros(len(self.oft_R), self.size, self.size)
        upper = upper.index_put((torch.arange(len(upper), device=rows.device)[:, None], rows, columns), self.oft_R)
        return cayley(upper - upper.mT, self.terms)

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        # a rotation rounded to 16 bits is none: it is applied in its own precision, outside autocast too
        with torch.autocast(x.device.type, enabled=False):
            rotations = self.rotations().expand(self.blocks, -1, -1)
            rotated = times_blocks(x.to(self.oft_R.dtype), rotations)
        y: Tensor = base(rotated.to(x.dtype))
        return y

    def deltas(self, module: Module) -> dict[str, Tensor]:
        weight = weight_of(module).to(self.oft_R.dtype)
        split = weight.reshape(len(weight), self.blocks, self.size).transpose(0, 1)
        rotated = (split @ self.rotations().mT).transpose(0, 1).reshape(weight.shape)
        return {"weight": oriented(rotated - weight, module)}


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows times a block-diagonal matrix.

    Args:
        rows: ``(..., number * size)``.
        blocks: ``(number, size, size)``.

    Returns:
        The shape of ``rows``.
    """
    number, size, _ = blocks.shape
    # one product a block over all rows: a broadcast product a row would write the blocks out for every row
    split = rows.reshape(-1, number, size).transpose(0, 1)
    return torch.bmm(split, blocks).transpose(0, 1).reshape(rows.shape)


def cayley(skew: Tensor, terms: int | None = None) -> Tensor:
    """Cayley's transform ``(I - Q)(I + Q)^-1`` of skew-symmetric matrices, or the first terms of its series.

    Args:
        skew: ``(..., n, n)``.
        terms: None for the exact one. The series is that of the transpose's inverse form,
            ``(I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ...``, whose last term counts once; the published adapters
            are made so, and since Q's sign is learned the two describe the same rotations.

    Returns:
        Orthogonal matrices, ``(..., n, n)``.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms is None:
        solved: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
        return solved
    total, power = eye + 2 * skew, skew
    last = max(terms, 4) - 1 if terms > 2 else 1
    for exponent in range(2, last + 1):
        power = power @ skew
        total = total + (power if exponent == last else 2 * power)
    return total
