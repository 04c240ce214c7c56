"""What the layers below the first trained one give is computed once and read from disk in later epochs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from lightning_peft.analysis.sizes import size
from lightning_peft.core.adapters import require_adapters
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.core.frozen_layers import Watch, layers_around, left_out, watching
from lightning_peft.core.per_forward import this_forward
from lightning_peft.core.probing import agree, undrawn
from lightning_peft.data.state_file import StateFile, row_keys
from lightning_peft.methods.reader import find_layers


class CacheFrozenLayers(Callback):
    """Skips the frozen layers of a stack from the second epoch on, where what they give is always the same.

    For methods that train nothing below some layer, such as ``last_layers`` or ``head``, with rows that come again as
    they are: no dropout below that layer, no augmentation. In the first epoch the last frozen layer's output for each
    row goes to a memory-mapped file; a batch whose rows are all there starts at the first trained layer. Validation
    runs the whole model. A row of n tokens takes n times the model's width times 4 bytes in float32, 2 in 16 bits.

    A network that runs beside the frozen layers and reads each of them (ladder side tuning) finds the outputs of all
    but the last in the file, which is so many times as large.

    On the first batch that could be read it is seen whether the model then says what it says without; where it does
    not, where something frozen draws random numbers, or where the first layer trains, all goes on without the file and
    a warning says why.

    Args:
        folder: where the file lies; None takes the trainer's ``default_root_dir``.
        max_gb: bytes that the file may take, in 10^9. Rows beyond that are computed each time.
        keep: keep the file for runs on the same base with the same data; else it is deleted when training ends.
        model: the name of the adapted model in the LightningModule; `PeftModule`'s is ``"model"``.

    Raises:
        ValueError: if ``max_gb`` is not above 0; when training starts, if the model has no stack of layers, if its
            batches are packed, or if there are several processes: each would see other rows in each epoch.
    """

    def __init__(
        self, folder: str | Path | None = None, max_gb: float = 4.0, keep: bool = False, model: str = "model"
    ) -> None:
        if max_gb <= 0:
            raise ValueError(f"CacheFrozenLayers: max_gb must be above 0, but got {max_gb}")
        self.folder = folder
        self.limit = int(max_gb * 1e9)
        self.keep = keep
        self.model = model
        self._cache: _Cache | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "runs_without_padding", False):
            raise ValueError(
                "CacheFrozenLayers needs each row as it was in the epoch before, but this task packs the rows of a "
                "batch; set task.packing=false"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"CacheFrozenLayers works in one process, but there are {trainer.world_size}, which share the rows out "
                "anew in each epoch; leave it out"
            )
        root = pl_module.get_submodule(self.model)
        names = find_layers("CacheFrozenLayers", root, None).names
        folder = Path(trainer.default_root_dir if self.folder is None else self.folder)
        self._cache = _Cache(root, [root.get_submodule(n) for n in names], folder, self.limit, keep=self.keep)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._cache is not None:
            self._cache.report()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None


class _Cache:
    """Stands around the model's forward in training."""

    def __init__(self, root: Module, layers: list[Module], folder: Path, limit: int, *, keep: bool) -> None:
        self.root, self.layers, self.folder, self.limit, self.keep = root, layers, folder, limit, keep
        self.depth: int | None = None  # how many layers are frozen, once it is known
        self.file: StateFile | None = None
        self._frozen: list[torch.nn.Parameter] = []
        self._checked = self._aside = self._told = self._read_each = False
        self._open = ExitStack()
        self._rows: tuple[list[str], Tensor | None] = ([], None)
        self._in_tuples: list[bool] = []
        self._watch: Watch | None = None
        self._mine: Callable[[], bool] = lambda: False
        self._hooks = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(self, root: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._aside or self.depth == 0 or not root.training or not torch.is_grad_enabled():
            return
        if args:
            self._stop("the model is called with positional inputs; call it with named ones")
            return
        self._mine = this_forward()
        if any(p.requires_grad for p in self._frozen):  # what was frozen has begun to train
            self._forget()
        inputs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim()}
        mask = inputs.get("attention_mask")
        self._rows = row_keys(inputs, mask), mask
        if self.file is not None and self.depth and self.file.holds(self._rows[0]):
            states = self._read(*self._rows)
            if self._checked or self._is_right(kwargs, states):
                self._open.enter_context(self._from_file(states))
                return
        self._watch = self._open.enter_context(watching(self.layers))

    def _after(self, root: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._aside or not self._mine():
            return
        self._open.close()
        watch, self._watch = self._watch, None
        if watch is None or output is None:  # which it is after an error
            return
        if len(watch.states) != len(self.layers):
            self._stop("its layers do not run once each")
            return
        if self.depth is None:
            self._begin(watch, kwargs)
        if self.depth and self.file is not None:
            states = self._kept(watch)
            keys, mask = self._rows
            for i, key in enumerate(keys):
                self.file.put(key, states[i] if mask is None else states[i][mask[i].bool()])

    def _begin(self, watch: Watch, kwargs: dict[str, Any]) -> None:
        adapted = (i for i, layer in enumerate(self.layers) if not _runs_as_it_is(layer))
        self.depth = min(watch.frozen, next(adapted, len(self.layers)))
        if not self.depth:
            self._stop("the first layer trains, or what comes before it, or it gives more than hidden states")
            return
        with self._beside(), watching(self.layers[: self.depth]) as again:
            self.root(**kwargs)
        self._read_each = any(layers_around(layer) for layer in self.layers[: self.depth])
        first, second = watch.states[self.depth - 1], again.states[-1]
        if first is None or second is None or not torch.equal(first, second):
            self._stop(
                "the frozen layers draw random numbers; set their dropout to 0, such as "
                "model.config.hidden_dropout_prob=0 and model.config.attention_probs_dropout_prob=0 for BERT"
            )
            return
        self._frozen = [p for p in self.root.parameters() if not p.requires_grad]
        self._in_tuples = watch.in_tuples[: self.depth]
        self.file = StateFile.found(self.folder, self.limit, self._made_by(first.dtype))
        rank_zero_info(f"{self.depth} of {len(self.layers)} layers are frozen: read from {self.file.path} once seen")

    def _made_by(self, dtype: torch.dtype) -> dict[str, Any]:
        adapters = require_adapters(self.root)
        frozen = {id(p) for p in self._frozen}
        trained = [n for n, p in self.root.named_parameters() if id(p) not in frozen]
        config = self.root.config.to_dict() if hasattr(self.root, "config") else {}  # type: ignore[operator, union-attr]
        return {
            "base": fingerprint(adapters.base_digests, trained),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "layers": self.depth,
            "each": self._read_each,
            "dtype": str(dtype),
        }

    def _is_right(self, kwargs: dict[str, Any], states: Tensor) -> bool:
        """Whether the model says the same without its frozen layers."""
        with self._beside():
            whole = self.root(**kwargs)
        with self._beside(), self._from_file(states):
            short = self.root(**kwargs)
        mask = self._rows[1]
        self._checked = agree(_said(short, mask), _said(whole, mask))
        if not self._checked:
            self._stop("the layers above read more than the last frozen layer's output")
        return self._checked

    def _kept(self, watch: Watch) -> Tensor:
        """For the file: ``(batch, tokens, hidden)``; ``(batch, tokens, layers, hidden)`` where each layer is read."""
        assert self.depth
        states = [state for state in watch.states[: self.depth] if state is not None]
        return torch.stack(states, -2) if self._read_each else states[-1]

    def _from_file(self, states: Tensor) -> AbstractContextManager[None]:
        """A forward without the frozen layers, which give what the file has."""
        assert self.depth
        each = list(states.unbind(-2)) if self._read_each else [*[None] * (self.depth - 1), states]
        return left_out(self.layers[: self.depth], each, self._in_tuples)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """A forward that is no step: it leaves hooks and random numbers alone, and makes no graph."""
        self._aside = True
        try:
            with undrawn(self.root), torch.no_grad():
                yield
        finally:
            self._aside = False

    def _read(self, keys: list[str], mask: Tensor | None) -> Tensor:
        assert self.file is not None
        device = next(self.root.parameters()).device
        states = self.file.get(keys).to(device, non_blocking=True)
        if mask is None:
            return states.view(len(keys), -1, *states.shape[1:])
        whole = states.new_zeros(*mask.shape, *states.shape[1:])
        whole[mask.bool()] = states
        return whole

    def report(self) -> None:
        """Says once how much the file holds, and whether that is all."""
        if self.file is None or self._told:
            return
        self._told = True
        rank_zero_info(f"{self.file.path} holds {len(self.file):,} rows in {size(self.file.used)}")
        if self.file.full:
            rank_zero_warn(
                f"{self.file.path} is full ({size(self.file.limit)}): other rows are computed each time; raise max_gb, "
                "or choose a folder with more room"
            )

    def _stop(self, why: str) -> None:
        rank_zero_warn(f"CacheFrozenLayers keeps nothing: {why}")
        self._forget()
        self.depth = 0

    def _forget(self) -> None:
        if self.file is not None:
            self.file.delete()
        self.depth, self.file, self._frozen, self._checked = None, None, [], False

    def close(self) -> None:
        """Takes the hooks off; deletes the file, or keeps it for another run."""
        self._open.close()
        for hook in self._hooks:
            hook.remove()
        if self.file is not None and self.file.dtype is not None and self.keep:
            self.file.keep(self._made_by(self.file.dtype))
        elif self.file is not None:
            self.file.delete()


def _runs_as_it_is(layer: Module) -> bool:
    """Whether no adapter changes what a layer gives."""
    inside = any(layers_around(part) for part in layer.modules() if part is not layer)
    return not inside and all(around.beside for around in layers_around(layer))


def _said(output: Any, mask: Tensor | None) -> Tensor:
    """What a model says, of tokens those that are no padding."""
    found = (getattr(output, name, None) for name in ("logits", "last_hidden_state"))
    said: Tensor = output if isinstance(output, Tensor) else next(t for t in found if t is not None)
    return said if mask is None or said.shape[:2] != mask.shape else said[mask.bool()]
