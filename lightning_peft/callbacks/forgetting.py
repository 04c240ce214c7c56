"""How far a training takes a model away from its base, measured on texts or images that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn import Module
from typing_extensions import override

from lightning_peft.analysis.held_out import Reading, read_rows, stacks_of, writes
from lightning_peft.analysis.run_files import FORGETTING
from lightning_peft.analysis.similarity import linear_cka
from lightning_peft.callbacks.base_reading import inputs_digest, read_kept, write_kept
from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.disable import disabled
from lightning_peft.core.routing import Routing
from lightning_peft.data.held_out import Batch, held_out_texts, image_batches, text_batches
from lightning_peft.data.rows import RowDataModule
from lightning_peft.formats.writing import write_json

METRIC = "forgetting"
_SCHEMA = 1


class Forgetting(Callback):
    """Compares the model with its base where fit begins and where it ends, on rows that are not trained on.

    A language model's forgetting is the rise of its loss on held-out text, in nats a token; it is below 0 where the
    model has become better at it. That of an encoder, a vision model or an encoder-decoder is the mean over its layers
    of 1 - CKA: the linear centered kernel alignment of a layer's hidden states with the base's (arXiv 1905.00414), each
    position that is no padding an example. Language models get that drift by layer too. 0 is a model that forgot
    nothing; larger is worse.

    The base is the model without its adapter. Of a method that trains weights in place and keeps no originals it is the
    model as fit finds it; what it said waits in ``forgetting_base.safetensors`` for a run that goes on. The trained
    model has the weights with which training ends, which need not be those of the best checkpoint. Training is not
    changed by it. One rank measures.

    Args:
        folder: where ``forgetting.json`` is written; None writes nothing.
        texts: a file, a folder or a pattern (a .txt file's lines, a table's column ``text``), or a list of texts. None
            takes docstrings of the standard library's modules; the embedded data has those of classes and functions.
            Vision models are given images of the validation rows.
        rows: how many texts or images. Hidden states of all their tokens are kept on the CPU until training ends.
        max_length: tokens that a text is cut to.
        model: the name of the Hugging Face model in the LightningModule; None takes the one that there is.
        tokenizer: the model's; None takes the LightningModule's or the data module's.
        layer_modules: all layers of a model whose stack is not found: names, suffixes or an expression.

    Attributes:
        result: what ``forgetting.json`` holds; None until training ends.

    Raises:
        ValueError: if ``rows`` or ``max_length`` is too small; at setup, under a strategy that shards the model; when
            fit starts, if a resumed run's base is gone, or there is no text.
        TypeError: when fit starts, if there is no Hugging Face model, or nothing to make its inputs with.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        texts: str | Path | Sequence[str] | None = None,
        rows: int = 64,
        max_length: int = 64,
        model: str | None = None,
        tokenizer: Any = None,
        layer_modules: list[str] | str | None = None,
    ) -> None:
        for name, value, least in (("rows", rows, 1), ("max_length", max_length, 2)):
            if value < least:
                raise ValueError(f"Forgetting: {name} must be {least} or more, but got {value}")
        self.folder = None if folder is None else Path(folder)
        self.texts = texts
        self.rows = rows
        self.max_length = max_length
        self.model = model
        self.tokenizer = tokenizer
        self.layer_modules = layer_modules
        self.result: dict[str, Any] | None = None
        self._before: Reading | None = None
        self._batches: list[Batch] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"Forgetting runs the whole model on one rank, but under {type(trainer.strategy).__name__} no rank "
                "holds it; leave the callback out, or train under DDP or on one device"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = None
        self._forget()
        model = self._model(pl_module)
        layers = stacks_of(model, self.layer_modules)
        if not trainer.is_global_zero:
            return
        self._batches = self._held_out(trainer, pl_module, model)
        digest = inputs_digest(self._batches)
        kept = _base_is_kept(pl_module)
        if trainer.ckpt_path is not None and not kept:
            self._before = read_kept(self.folder, digest, list(layers))
        else:
            with _base(pl_module, kept=kept):
                self._before = self._read(trainer, model, layers)
            if self.folder is not None and not kept:
                write_kept(self.folder, self._before, digest)
        _warn_of_few(self._before)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before is None:
            return
        model = self._model(pl_module)
        layers = stacks_of(model, self.layer_modules)
        self.result = compared(self._before, self._read(trainer, model, layers))
        self._forget()
        value = self.result["forgetting"]
        shown = {METRIC: torch.tensor(math.nan if value is None else value, dtype=torch.float64)}
        trainer.callback_metrics.update(shown)
        for logger in trainer.loggers:
            logger.log_metrics({METRIC: float(shown[METRIC])}, step=trainer.global_step)
        if self.folder is not None:
            write_json(self.folder / FORGETTING, self.result)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.result is not None:
            print(spoken(self.result), flush=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def _forget(self) -> None:
        self._before, self._batches = None, []

    def _model(self, module: LightningModule) -> Any:
        from transformers import PreTrainedModel

        if self.model is not None:
            found = [self.model] if isinstance(dict(module.named_modules()).get(self.model), PreTrainedModel) else []
        else:
            inside = [n for n, m in module.named_modules() if isinstance(m, PreTrainedModel)]
            found = [
                n for n in inside if not any(n.startswith(f"{other}.") or not other for other in inside if other != n)
            ]
        if len(found) != 1:
            there = f"has none at {self.model!r}" if self.model is not None else f"has {found or 'none'}"
            raise TypeError(
                f"Forgetting reads the hidden states of one Hugging Face model (a PreTrainedModel), but "
                f"{type(module).__name__} {there}; " + ("name one: model=..." if found else "leave the callback out")
            )
        return module.get_submodule(found[0])

    def _held_out(self, trainer: Trainer, module: LightningModule, model: Any) -> list[Batch]:
        data = getattr(trainer, "datamodule", None)
        if model.main_input_name == "pixel_values":
            if not isinstance(data, RowDataModule) or "validation" not in data.splits:
                raise TypeError(
                    f"Forgetting shows {type(model).__name__} the validation rows of an ImageDataModule, but got "
                    + ("one without any" if isinstance(data, RowDataModule) else "none")
                )
            return list(image_batches(data, self.rows))
        tokenizer = next(
            (t for t in (self.tokenizer, *(getattr(o, "tokenizer", None) for o in (module, data))) if t is not None),
            None,
        )
        if model.main_input_name != "input_ids" or tokenizer is None:
            lacks = "has no tokenizer" if model.main_input_name == "input_ids" else f"reads {model.main_input_name}"
            raise TypeError(
                f"Forgetting reads texts or images, but {type(module).__name__} {lacks}; "
                + ("give one: Forgetting(tokenizer=...)" if tokenizer is None else "leave the callback out")
            )
        texts = held_out_texts(self.texts, self.rows, data)
        return list(text_batches(texts, model, tokenizer, self.max_length, bare=writes(model)))

    def _read(self, trainer: Trainer, model: Any, layers: Mapping[str, Module]) -> Reading:
        with isolate_rng(), trainer.strategy.precision_plugin.val_step_context():
            return read_rows(model, layers, (trainer.strategy.batch_to_device(batch) for batch in self._batches))


def compared(before: Reading, after: Reading) -> dict[str, Any]:
    """What ``forgetting.json`` says: numbers that are not finite are None.

    Args:
        before: what the base made of the rows.
        after: what the trained model made of them.
    """
    drift = {name: 1 - linear_cka(states, after.states[name]) for name, states in before.states.items()}
    if before.loss is not None and after.loss is not None:
        kind, numbers = "loss", (before.loss, after.loss, after.loss - before.loss)
    else:
        mean = sum(drift.values()) / len(drift)
        kind, numbers = "cka", (1.0, 1 - mean, mean)
    found = dict(zip(("before", "after", "forgetting"), map(_finite, numbers), strict=True))
    return {"schema": _SCHEMA, "kind": kind, **found, "layers": {name: _finite(value) for name, value in drift.items()}}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def spoken(result: dict[str, Any]) -> str:
    """A line for the end of a run.

    Args:
        result: as `compared` gives it.
    """
    numbers = {k: math.nan if result[k] is None else result[k] for k in ("before", "after", "forgetting")}
    if result["kind"] == "loss":
        said = f"nats a token of held-out text ({numbers['before']:.4f} to {numbers['after']:.4f})"
    else:
        drift = [math.nan if v is None else v for v in result["layers"].values()]
        said = f"1 - CKA with the base (layers {min(drift):.4f} to {max(drift):.4f})"
    return f"forgetting           {numbers['forgetting']:.4f} {said}"


def _adapted(module: Module) -> list[Module]:
    return [part for part in module.modules() if adapters_of(part) is not None]


def _base_is_kept(module: Module) -> bool:
    """Whether the base can be given back at any time."""
    trees = [tree for part in _adapted(module) for tree in adapters_of(part).trees.values()]  # type: ignore[union-attr]
    return bool(trees) and all(tree.record.originals is not None for tree in trees)


@contextmanager
def _base(module: Module, *, kept: bool) -> Iterator[None]:
    """The base itself; without originals no adapter runs, and what trains in place is as it is."""
    with ExitStack() as stack:
        for part in _adapted(module):
            adapters = adapters_of(part)
            assert adapters is not None
            stack.enter_context(disabled(part) if kept else adapters.switch.pinned(Routing(())))
        yield


def _warn_of_few(reading: Reading) -> None:
    positions, width = next(iter(reading.states.values())).shape
    if positions <= width:
        rank_zero_warn(
            f"Forgetting compares {positions} positions of hidden states {width} wide, so few that CKA is near 1 "
            "whatever the model: give more rows"
        )
