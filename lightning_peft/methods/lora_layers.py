"""The layers of LoRA: what a low-rank change looks like beside each kind of module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Embedding, Linear, Module, MultiheadAttention, Parameter
from torch.nn import functional as F

from lightning_peft.core.adapted import Base, module_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.matching import class_of, is_conv1d
from lightning_peft.core.problems import an, raise_problems
from lightning_peft.methods.linear import is_readable, module_below, oriented, sizes, weight_of
from lightning_peft.methods.lora_eva import UNSEEN, is_seen
from lightning_peft.methods.lora_init import starting_factors
from lightning_peft.ops.lora_linear import can_draw_again, count, lora_beside, lora_linear
from lightning_peft.ops.lora_rows import Factors, add_by_row
from lightning_peft.ops.row_norms import row_norms

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA


def refuse_rank(name: str, r: int, limit: int, *, parameter: bool = False) -> None:
    """Refuses a rank above the smaller side of a weight, which adds numbers and no change.

    Args:
        name: what has the weight.
        r: the rank.
        limit: the smaller side.
        parameter: whether it is a parameter, not a module.

    Raises:
        ValueError: if it is above.
    """
    if r > limit:
        out = "leave it out of target_parameters" if parameter else f"exclude it (exclude_modules=[{name!r}])"
        raise ValueError(
            f"LoRA: a rank of {r} is above {limit}, the smaller side of the weight of {name!r}; lower r, give it a "
            f"rank of its own (rank_pattern={{{name!r}: {limit}}}) or {out}"
        )


class LowRank(AdapterLayer):
    """What all low-rank layers share: ``lora_A``, ``lora_B``, the scale and the dropout on A's input.

    Args:
        name: the module's name, which may have a rank and a strength of its own.
        module: the adapted module.
        method: the options.
        a: shape of A behind the rank.
        b: shape of B, with the number of outputs before the rank and what follows behind it.
        copies: how many pairs of factors lie side by side along the rank.

    Attributes:
        awaits_data: whether A is still to be taken from data.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    p: float
    awaits_data: bool

    def __init__(
        self, name: str, module: Module, method: LoRA, a: Sequence[int], b: Sequence[int], copies: int = 1
    ) -> None:
        super().__init__()
        device = device_for(module)
        r, n_out = method.rank(name), b[0]
        drawn = torch.empty(r * copies, *a, dtype=torch.float32, device=device)
        zeros = torch.zeros(n_out, r * copies, *b[1:], dtype=torch.float32, device=device)
        if method.init_lora_weights == "gaussian":
            drawn.normal_(std=1 / r)
        else:
            # the numbers of init.kaiming_uniform_(drawn, a=sqrt(5)), which would be a quarter of the layer's making
            bound = 1 / math.sqrt(math.prod(a))
            drawn.uniform_(-bound, bound)
        # put where Module.__setattr__ would: what it looks at first, each time, is a third of a layer's making
        self._parameters["lora_B"] = Parameter(zeros)
        if method.lora_fa:
            self._buffers["lora_A"] = drawn
        else:
            self._parameters["lora_A"] = Parameter(drawn)
        self.__dict__.update(scale=method.scale(name), p=method.lora_dropout, awaits_data=method.needs_data)

    @property
    def limit(self) -> int:
        """The smaller side of the weight, above which no rank adds anything."""
        return min(self.lora_A.shape[1:].numel(), len(self.lora_B))

    def dropped(self, x: Tensor) -> Tensor:
        """The input as A sees it."""
        return F.dropout(x, self.p, self.training) if self.p else x


class LinearLayer(LowRank):
    """``base(x) + s B A x`` on a Linear or Conv1D; x: ``(..., in)`` -> ``(..., out)``.

    Where the start is not zero (PiSSA, OLoRA, orthogonal) it is subtracted: ``s (B A - B0 A0)``, so that the model
    starts as the base and the base stays as it is.
    """

    def __init__(self, name: str, module: Any, method: LoRA) -> None:
        n_in, n_out = sizes(module)
        super().__init__(name, module, method, (n_in,), (n_out,))
        reads = "use_dora=True" if method.use_dora else f"init_lora_weights={method.init_lora_weights!r}"
        if (method.use_dora or method.starts_apart) and not is_readable(module):
            raise ValueError(
                f"LoRA: {reads} reads the weight of {name!r}, which is offloaded or quantized; leave that option out, "
                "or load the model as it is"
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

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """Runs the module and adds the change.

        Raises:
            RuntimeError: in training, if A is to be taken from data and none has been seen.
        """
        if self.awaits_data and self.training:
            self._require_data()
        p = self.p if self.training else 0.0
        fused = self._is_plain() and (not p or can_draw_again(x.device))
        weight = base.plain_weight(x) if isinstance(base, Base) and fused else None
        if weight is not None and isinstance(base, Base):
            count("fused")
            bias = base.module._parameters["bias"]
            return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scale, p)
        y = self._given(base, x)
        # what shards tensors, or transforms functions, does so to plain operators
        if fused and {type(t) for t in (x, y, self.lora_A, self.lora_B)} <= {Tensor, Parameter}:
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
        return as_is and self._is_plain() and {type(self.lora_A), type(self.lora_B)} <= {Tensor, Parameter}

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
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if "lora_A0" in self._buffers:
            a, b = torch.cat([a, self.get_buffer("lora_A0")]), torch.cat([b, -self.get_buffer("lora_B0")], dim=1)
        return row_norms(weight_of(module), a, b, self.scale)

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


class EmbeddingLayer(AdapterLayer):
    """``base(ids) + s B A[:, ids]`` on an Embedding; A: ``(r, vocabulary)`` at zero, B: ``(hidden, r)``."""

    def __init__(self, name: str, module: Embedding, method: LoRA) -> None:
        super().__init__()
        device = device_for(module)
        r = method.rank(name)
        a = torch.zeros(r, module.num_embeddings, dtype=torch.float32, device=device)
        b = torch.randn(module.embedding_dim, r, dtype=torch.float32, device=device)
        self.lora_embedding_A = Parameter(a)
        self.lora_embedding_B = Parameter(b)
        self.limit = min(module.num_embeddings, module.embedding_dim)
        self.scale = method.scale(name)
        self.padding_idx = module.padding_idx
        # Gemma-like embeddings multiply what they look up
        self.embed_scale = getattr(module, "embed_scale", None)

    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Runs the module and adds the change."""
        y: Tensor = base(ids)
        # as in the module itself the padding's row does not train
        rows = F.embedding(ids, self.lora_embedding_A.T, self.padding_idx).to(y.dtype)
        change = rows @ self.lora_embedding_B.T.to(y.dtype) * self.scale
        if self.embed_scale is not None:
            change = change * self.embed_scale
        return y + change

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of the weight."""
        return {"weight": (self.lora_embedding_B @ self.lora_embedding_A).T * self.scale}


class ConvLayer(LowRank):
    """``base(x) + s B(A(x))`` with A a convolution of the base's geometry into r channels and B a 1x1 one."""

    def __init__(self, name: str, module: Conv1d | Conv2d | Conv3d, method: LoRA) -> None:
        if module.groups != 1:
            raise ValueError(
                f"LoRA: {name!r} is a convolution in {module.groups} groups, for which there is no low-rank form "
                "that can be merged; expected groups=1, so exclude it"
            )
        ones = [1] * len(module.kernel_size)
        a = (module.in_channels, *module.kernel_size)
        super().__init__(name, module, method, a, (module.out_channels, *ones))

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """Runs the module and adds the change."""
        y: Tensor = base(x)
        module = module_of(base)
        h: Tensor = module._conv_forward(self.dropped(x).to(y.dtype), self.lora_A.to(y.dtype), None)  # type: ignore[operator]
        b = self.lora_B.flatten(1).to(y.dtype)
        # A 1x1 convolution is a product over the channels, whatever the number of spatial dimensions.
        channel = y.dim() - (self.lora_A.dim() - 1)
        change: Tensor = torch.tensordot(b, h, ([1], [channel])).movedim(0, channel)
        return y + change * self.scale

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of the weight."""
        delta = torch.tensordot(self.lora_B.flatten(1), self.lora_A, ([1], [0]))
        return {"weight": delta * self.scale}


class AttentionLayer(LowRank):
    """LoRA on the projections of ``nn.MultiheadAttention``, which reads weights and calls nothing.

    ``lora_A``: ``(r, embed)``, ``lora_B``: ``(3 embed, r)`` on the joint input projection, a second pair under
    ``out_proj``. The attention runs on a view of the module with ``W + s B A`` in place of ``W``.
    """

    def __init__(self, name: str, module: MultiheadAttention, method: LoRA) -> None:
        raise_problems(
            f"LoRA on the nn.MultiheadAttention {name!r}",
            [
                None if module._qkv_same_embed_dim else "kdim and vdim must equal embed_dim",
                "lora_dropout must be 0, since the projections' input is not seen from outside"
                if method.lora_dropout
                else None,
            ],
        )
        n = module.embed_dim
        super().__init__(name, module, method, (n,), (3 * n,))
        self.out_proj = LowRank(name, module, method, (n,), (n,))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the module and adds the change."""
        if not isinstance(base, Base) or base.instance_forward is not None:
            raise RuntimeError(
                "LoRA on nn.MultiheadAttention runs with changed weights, so it must be the innermost adapter "
                "and the module must have no forward of its own; deactivate the other adapter"
            )
        module = base.module
        changed: dict[str, Tensor] = {}
        for key, delta in self.deltas(module).items():
            weight = module.get_parameter(key)
            changed[key] = weight + delta.to(weight.dtype)
        return base.cls.forward(base.view({**base.casts(), **changed}), *args, **kwargs)

    def deltas(self, module: Module) -> dict[str, Tensor]:
        """The change of the weight."""
        return {
            "in_proj_weight": self.lora_B @ self.lora_A * self.scale,
            "out_proj.weight": self.out_proj.lora_B @ self.out_proj.lora_A * self.scale,
        }


_LAYERS: dict[type, Callable[..., AdapterLayer]] = {
    Linear: LinearLayer,
    Embedding: EmbeddingLayer,
    Conv1d: ConvLayer,
    Conv2d: ConvLayer,
    Conv3d: ConvLayer,
    MultiheadAttention: AttentionLayer,
}


def layer_for(module: Module) -> Callable[..., AdapterLayer] | None:
    """The kind of layer for a module, or None where LoRA has none."""
    if is_conv1d(module):
        return LinearLayer
    return next((_LAYERS[c] for c in class_of(module).__mro__ if c in _LAYERS), None)
