"""Sparse tuning: chosen single entries of the weights are trained, ``h = (W + D) x`` with D zero elsewhere.

SHiRA (Bhardwaj et al., arXiv 2406.13175, 3.1) chooses at random or by the weights' size; the FISH mask (Sung et al.,
arXiv 2111.09839, 3) by the empirical Fisher information ``mean_i (dL_i / dW)^2``. Two things deviate there: the number
of entries is fixed for each module instead of for the whole model, so that shapes are known before any data is seen;
and ``L_i`` is a batch's loss, which is the paper's example for batches of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lightning_peft.core.adapted import site_of
from lightning_peft.core.layer import AdapterLayer, device_for
from lightning_peft.core.options import check_types, range_problems
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.core.tree import AdapterTree
from lightning_peft.methods.linear import DeltaLayer, LinearMethod, is_readable, sizes, weight_of
from lightning_peft.ops.sparse_linear import dense, sparse_linear

_MASKS = ("random", "magnitude", "gradient")
_UNSEEN = (
    "SparseTuning(mask_type='gradient') chooses what it trains by data that it has not seen; call "
    "adapter.prepare(losses) before the first training step"
)


@dataclass(kw_only=True)
class SparseTuning(LinearMethod):
    """Trains ``r (in + out)`` single entries of each ``W: (out, in)``, as many as a LoRA of rank r has numbers.

    ``D: (out, in)`` holds the values ``(n,)``, zero at first, at the places ``(2, n)``, which never change once chosen
    and are saved with the adapter.

    Args:
        r: sets how many entries train in a module; ``r (in + out)`` may not be above ``in * out``. The rank of the
            change is not bounded by it.
        mask_type: which entries: ``"random"``; ``"magnitude"``, the weight's largest (SHiRA-WM); ``"gradient"``, those
            with the largest mean squared gradient over some training data (FISH mask).
        random_seed: of the random choice, which is the same on every machine and for modules of one shape.
        mask_batches: how many batches ``"gradient"`` looks at, 1 or more; the paper finds a few hundred examples
            enough.
        target_modules: names, suffixes, a regular expression, or ``"all-linear"``, which leaves out the output head
            where transformers says which one it is (elsewhere exclude a small head).
        exclude_modules: patterns in the same forms, taken away again.
        layers_to_transform: only the layers of these numbers.
        modules_to_save: modules that train in full, as copies that the adapter owns.
        learning_rate: suits AdamW.

    Raises:
        ValueError: if a number or a choice is out of its range.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int = 0
    mask_batches: int = 32

    peft_type: ClassVar[str | None] = "SHIRA"

    def __post_init__(self) -> None:
        check_types(self)
        raise_problems(
            "SparseTuning",
            [
                *range_problems(self, counts=["r", "mask_batches"], positive=["learning_rate"]),
                f"mask_type {self.mask_type!r} is unknown{nearest(self.mask_type, _MASKS)}"
                if self.mask_type not in _MASKS
                else None,
            ],
        )

    def layer(self, name: str, module: Module) -> AdapterLayer:
        """The layer for one module.

        Raises:
            ValueError: if the module has fewer entries than are to be trained, or they cannot be compared.
        """
        n_in, n_out = sizes(module)
        if self.r * (n_in + n_out) > n_in * n_out:
            most = n_in * n_out // (n_in + n_out)
            raise ValueError(
                f"SparseTuning: r={self.r} asks for {self.r * (n_in + n_out)} entries of {name!r}, which has "
                f"{n_in * n_out}; r can be {most} at most there, or exclude it"
            )
        if self.mask_type == "magnitude" and not is_readable(module):
            raise ValueError(
                f"SparseTuning: mask_type='magnitude' reads the weight of {name!r}, which is offloaded or quantized; "
                "choose 'random' or 'gradient'"
            )
        return SparseLayer(module, self)

    @property
    def needs_data(self) -> bool:
        """Whether the entries are chosen by looking at training data."""
        return self.mask_type == "gradient"

    def prepare(self, model: Module, tree: AdapterTree, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Chooses the entries with the largest mean squared gradient, in each module of its own.

        Args:
            model: the adapted model, in evaluation mode.
            tree: the adapter.
            losses: a callable for each batch of training data, which runs the model on it and gives the loss; the
                first ``mask_batches`` are used.

        Raises:
            ValueError: if there is no batch, or the loss does not depend on the adapted modules.
        """
        layers = [layer for layer in tree.layers_by_module.values() if isinstance(layer, SparseLayer)]
        try:
            probes = [layer.begin_scoring() for layer in layers]
            reached = False
            for loss in islice(losses, self.mask_batches):
                with torch.enable_grad():
                    value = loss()
                grads = torch.autograd.grad(value, probes, allow_unused=True) if value.requires_grad else ()
                for layer, grad in zip(layers, grads, strict=False):
                    if grad is not None:
                        reached = True
                        layer.add_score(grad)
            if not reached:
                raise ValueError(
                    "SparseTuning: no loss depends on the modules whose entries are to be chosen; give at least one "
                    "batch, and activate the adapter"
                )
            for layer in layers:
                layer.choose()
        finally:
            for layer in layers:
                layer.end_scoring()

    def peft_config(self, model: Module, placed: Sequence[str]) -> dict[str, Any]:
        """The fields of ``adapter_config.json``; how much data was looked at is no field of PEFT's.

        Raises:
            RuntimeError: if the entries are to be chosen by data and none has been seen, so there is nothing to write.
        """
        sites = [site for n in placed if (site := site_of(model.get_submodule(n))) is not None]
        own = [x for s in sites for x in s.layers.values() if isinstance(x, SparseLayer) and x.method is self]
        if not all(layer.chosen for layer in own):
            raise RuntimeError(_UNSEEN)
        config = super().peft_config(model, placed)
        del config["mask_batches"]
        return config

    @classmethod
    def from_peft_config(cls, config: dict[str, Any]) -> Self:
        """The method that an ``adapter_config.json`` describes.

        Raises:
            ValueError: if it asks for an option that is not supported here.
        """
        # a mask function of somebody's own has done its work: the places are in the file
        known = config.get("mask_type") in _MASKS
        return super().from_peft_config(config if known else {k: v for k, v in config.items() if k != "mask_type"})


class SparseLayer(DeltaLayer):
    """Chosen entries of one weight.

    Args:
        module: a Linear or Conv1D.
        method: the options; the number of entries fits the module.
    """

    def __init__(self, module: Module, method: SparseTuning) -> None:
        super().__init__()
        self.method = method
        n_in, n_out = sizes(module)
        self.shape = (n_out, n_in)
        self.count = method.r * (n_in + n_out)
        device = device_for(module)
        self.shira_weight = Parameter(torch.zeros(self.count, dtype=torch.float32, device=device))
        # -1 is nowhere: a place that data is still to choose
        nowhere = torch.full((2, self.count), -1, dtype=torch.int32, device=device)
        self.register_buffer("shira_indices", nowhere)
        self.probe: Tensor | None = None
        self.score: Tensor | None = None
        self._chosen = False
        if method.mask_type == "random":
            generator = torch.Generator().manual_seed(method.random_seed)
            self._place(torch.randperm(n_in * n_out, generator=generator)[: self.count])
        elif method.mask_type == "magnitude":
            self._place(weight_of(module).float().abs().flatten().topk(self.count).indices)

    @property
    def chosen(self) -> bool:
        """Whether the entries are chosen, here or before the adapter was loaded."""
        # asked of the tensor until it is so: how it is filled, by a checkpoint or a file, says nothing to the layer
        self._chosen = self._chosen or bool((self.get_buffer("shira_indices") >= 0).all())
        return self._chosen

    def index_limits(self) -> dict[str, tuple[int, ...]]:
        """The places are rows and columns of the weight."""
        return {"shira_indices": self.shape}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._chosen = False  # the learning-rate finder puts back the state from before the choice

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module gives, and the change beside it.

        Raises:
            RuntimeError: in training, if the entries are to be chosen by data and none has been seen.
        """
        if self.probe is not None:
            y: Tensor = base(x)
            return y + F.linear(x.to(y.dtype), self.probe.to(y.dtype))
        if not self.chosen:
            if self.training:
                raise RuntimeError(_UNSEEN)
            untouched: Tensor = base(x)
            return untouched
        return super().forward(base, x)

    def change(self, x: Tensor) -> Tensor:
        """``D x`` without keeping D."""
        return sparse_linear(x, self.shira_weight, self.get_buffer("shira_indices"), self.shape)

    def delta(self) -> Tensor:
        """The change of the weight, ``(out, in)``."""
        if not self.chosen:
            return self.shira_weight.new_zeros(self.shape)
        return dense(self.shira_weight, self.get_buffer("shira_indices"), self.shape)

    def begin_scoring(self) -> Tensor:
        """From now on the layer adds a zero D to the weight, whose gradients are those of the whole weight.

        Returns:
            That D, ``(out, in)``.
        """
        # one number seen as a matrix: it takes gradients, and no memory
        self.probe = self.shira_weight.detach().new_zeros(()).expand(self.shape).requires_grad_()
        self.score = self.shira_weight.detach().new_zeros(self.shape)
        return self.probe

    def add_score(self, grad: Tensor) -> None:
        """Adds the squares of one batch's gradient; sums rank as means do.

        Args:
            grad: of the D that `begin_scoring` gave.
        """
        assert self.score is not None
        self.score.addcmul_(grad, grad)

    def choose(self) -> None:
        """Places the layer's entries where the scores are largest."""
        assert self.score is not None
        self._place(self.score.flatten().topk(self.count).indices)

    def end_scoring(self) -> None:
        """Forgets the scores; the layer runs as it does in training."""
        self.probe = self.score = None

    def _place(self, flat: Tensor) -> None:
        n_in = self.shape[1]
        flat = flat.sort().values
        self.get_buffer("shira_indices").copy_(torch.stack([flat // n_in, flat % n_in]))
        self._chosen = True
