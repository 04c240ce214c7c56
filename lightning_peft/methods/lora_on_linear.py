"""LoRA's layer on a linear module: fused with it where that can be, with DoRA and starts apart from zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.base import PLAIN, Base, module_of
from lightning_peft.core.matching import class_of
from lightning_peft.core.problems import an
from lightning_peft.core.sharded import cut_along, is_sharded, is_split
from lightning_peft.methods.linear import is_readable, module_below, oriented, sizes, weight_of
from lightning_peft.methods.lora_eva import UNSEEN, is_seen
from lightning_peft.methods.lora_init import residual_factors, starting_factors
from lightning_peft.methods.lora_low_rank import LowRank, refuse_rank
from lightning_peft.ops.lora_linear import can_draw_again, count, is_transformed, lora_beside, lora_linear
from lightning_peft.ops.lora_rows import Factors, add_by_row
from lightning_peft.ops.row_norms import row_norms

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA


class LinearLayer(LowRank):
    """``base(x) + s B A x`` on a Linear or Conv1D; x: ``(..., in)`` -> ``(..., out)``.

    Where the start is not zero (PiSSA, OLoRA, orthogonal) it is subtracted: ``s (B A - B0 A0)``, so that the model
    starts as the base and the base stays as it is.
    """

    splits = True

    def __init__(self, name: str, module: Any, method: LoRA) -> None:
        (n_in, n_out), split = sizes(module), is_split(module)
        if split and (method.use_dora or method.starts_apart or method.lora_bias):
            raise ValueError(
                f"LoRA: {name!r} is split over processes (parallelize_module), which use_dora, lora_bias and starts "
                f"from the weight do not know; leave them out (init_lora_weights={method.init_lora_weights!r})"
            )
        super().__init__(name, module, method, (n_in,), (n_out,))
        reads = "use_dora=True" if method.use_dora else f"init_lora_weights={method.init_lora_weights!r}"
        if (method.use_dora or method.starts_apart) and not is_readable(module):
            raise ValueError(
                f"LoRA: {reads} reads the weight of {name!r}, which is offloaded, quantized or not read yet "
                "(load_in_shards); leave that option out, or load the model as it is"
            )
        if method.starts_apart:
            refuse_rank(name, len(self.lora_A), self.limit)
            start = starting_factors(
                str(method.init_lora_weights), weight_of(module).float(), len(self.lora_A), self.scale
            )
            for key, factor in zip(("lora_A", "lora_B"), start, strict=True):
                with torch.no_grad():
                    getattr(self, key).copy_(factor)
                # laid out as the factor itself: else the products could differ in their last bit
                self.register_buffer(f"{key}0", getattr(self, key).detach().clone())
        if method.lora_bias:
            self.lora_B_bias = Parameter(torch.zeros(n_out, dtype=torch.float32, device=self.lora_B.device))
        if method.use_dora:
            self.lora_magnitude_vector = Parameter(weight_of(module).float().norm(dim=1))
        if split:
            self._split_like(module)

    def _split_like(self, module: Any) -> None:
        """Cuts B's rows as the weight's are cut, and A's columns as the weight's.

        What the weight's other side shares, the same numbers stand in all processes: those of the first.
        """
        for key, dim in (("lora_A", 1), ("lora_B", 0)):
            held = self._parameters if key in self._parameters else self._buffers
            cut = cut_along(held[key].detach(), module.weight, dim)  # type: ignore[union-attr]
            held[key] = Parameter(cut) if held is self._parameters else cut  # type: ignore[assignment]

    @torch.no_grad()
    def make_up(self, name: str, module: Any) -> None:
        """Starts as what quantizing the module's weight has lost.

        Args:
            name: the module's name, for errors.
            module: the module.

        Raises:
            ValueError: if the weight is not quantized, or what it was before is not known.
        """
        refuse_rank(name, len(self.lora_A), self.limit)
        a, b = residual_factors(name, module, len(self.lora_A), self.scale)
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        if "lora_magnitude_vector" in self._parameters:
            self.lora_magnitude_vector.copy_(self._norm(module))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """Runs the module and adds the change.

        Raises:
            RuntimeError: in training, if A is to be taken from data and none has been seen.
        """
        if self.awaits_data and self.training:
            self._require_data()
        p = self.p if self.training else 0.0
        fused = self._is_plain() and (not p or can_draw_again(x.device)) and not is_transformed()
        weight = base.plain_weight(x) if isinstance(base, Base) and fused else None
        if weight is not None and isinstance(base, Base):
            count("fused")
            bias = base.module._parameters["bias"]
            return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scale, p)
        y = self._given(base, x)
        if is_sharded(y) and not is_sharded(self.lora_A):
            raise RuntimeError(
                "parallelize_module was called on an adapted model; call parallelize_module(model, ...) first, then "
                "adapt(model, method), then fully_shard(model)"
            )
        # what shards tensors does so to plain operators
        if fused and {type(t) for t in (x, y, self.lora_A, self.lora_B)} <= PLAIN:
            count("beside")
            return lora_beside(y, x, self.lora_A, self.lora_B, self.scale, p)
        count("plain")
        seen = self.dropped(x).to(y.dtype)
        change = self._product(seen, self.lora_A, self.lora_B)
        if "lora_A0" in self._buffers:
            change = change - self._product(seen, self.get_buffer("lora_A0"), self.get_buffer("lora_B0"))
        if "lora_B_bias" in self._parameters:
            change = change + self.lora_B_bias.to(y.dtype)
        if "lora_magnitude_vector" in self._parameters:
            return self._decomposed(base, y, seen, change * self.scale)
        return y + change * self.scale

    @classmethod
    def together(cls, layers: Sequence[LinearLayer | None], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module once for all examples, and to each run of them with one layer that layer's change.

        Options that change more than a product, and dropout, run by one adapter after the other.
        """
        x = args[0] if len(args) == 1 and not kwargs else None
        distinct = {layer for layer in layers if layer is not None}
        if not isinstance(x, Tensor) or x.dim() < 2 or not all(layer._is_one_product() for layer in distinct):
            return NotImplemented
        count("by_row")
        y = cls._given(base, x)
        changes = {n: Factors(n.lora_A.to(y.dtype), n.lora_B.to(y.dtype), n.scale) for n in distinct}
        rows = len(x) // len(layers)
        runs = [(rows * len(list(run)), changes[n] if n else None) for n, run in itertools.groupby(layers)]
        # what a plain Linear gives is new each time
        new = isinstance(base, Base) and base.plain_weight(x) is not None
        return add_by_row(y, x, runs, in_place=new)

    @staticmethod
    def _given(base: Callable[..., Any], x: Tensor) -> Tensor:
        y = base(x)
        if isinstance(y, Tensor):
            return y
        raise TypeError(
            f"LoRA adds to one tensor, but a {class_of(module_of(base)).__name__} gives {an(type(y).__name__)}: "
            "exclude it (exclude_modules=...)"
        )

    def _require_data(self) -> None:
        # asked of the tensors: how they were filled, by a checkpoint or a file, says nothing to the layer
        self.awaits_data = not is_seen(self.lora_A.detach(), self.lora_B.detach())
        if self.awaits_data and self.lora_B.requires_grad:
            raise RuntimeError(UNSEEN)

    def _is_plain(self) -> bool:
        return not (self._parameters.keys() - {"lora_A", "lora_B"} or self._buffers.keys() - {"lora_A"})

    def _is_one_product(self) -> bool:
        """Whether a forward here and now is ``s B A x`` of tensors that no sharding has made its own."""
        as_is = not (self.training and (self.p or self.awaits_data))
        return as_is and self._is_plain() and {type(self.lora_A), type(self.lora_B)} <= PLAIN

    @staticmethod
    def _product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def _decomposed(self, base: Callable[..., Any], y: Tensor, seen: Tensor, change: Tensor) -> Tensor:
        """``y + (g - 1) W x + g s B A x`` with ``g = m / |W + s B A|``, a row at a time (DoRA, 4.3).

        The norm takes no gradient, which the paper finds to cost nothing. Dropout is on both products.
        """
        module: Any = module_below(base)
        g = (self.lora_magnitude_vector / self._norm(module)).to(y.dtype)
        if self.p and self.training:
            product = F.linear(seen, weight_of(module).to(y.dtype))
        else:
            product = y if module.bias is None else y - module.bias.to(y.dtype)
        return y + (g - 1) * product + g * change

    def _difference(self) -> Tensor:
        delta = self.lora_B @ self.lora_A
        if "lora_A0" in self._buffers:
            delta = delta - self.get_buffer("lora_B0") @ self.get_buffer("lora_A0")
        return delta * self.scale

    @torch.no_grad()
    def _norm(self, module: Module) -> Tensor:
        return row_norms(weight_of(module), *self._factors(), self.scale)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B, those that are subtracted beside them."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if "lora_A0" in self._buffers:
            a, b = torch.cat([a, self.get_buffer("lora_A0")]), torch.cat([b, -self.get_buffer("lora_B0")], dim=1)
        return a, b

    def products(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Its factors, unless it trains more than a product of two."""
        if self._parameters.keys() - {"lora_A", "lora_B"}:
            return None
        a, b = self._factors()
        return {"weight": (a, b * self.scale)}

    def deltas(self, module: Any) -> dict[str, Tensor]:
        """The change of the weight."""
        delta = self._difference()
        if "lora_magnitude_vector" in self._parameters:
            weight = weight_of(module).to(delta.dtype)
            delta = (self.lora_magnitude_vector / self._norm(module)).unsqueeze(1) * (weight + delta) - weight
        changes = {"weight": oriented(delta, module)}
        if "lora_B_bias" in self._parameters:
            if module.bias is None:
                raise ValueError("lora_bias=True cannot be merged into a module without a bias; keep the adapter")
            changes["bias"] = self.lora_B_bias * self.scale
        return changes
