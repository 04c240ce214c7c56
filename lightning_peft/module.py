"""PeftModule: a ready LightningModule that fine-tunes a Hugging Face model with a method."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from lightning_peft.analysis.report import print_plan
from lightning_peft.callbacks.adaptation import (
    KEY,
    adapt_lightning_module,
    check_record,
    default_dtype,
    record_in,
)
from lightning_peft.callbacks.advice import Advice
from lightning_peft.callbacks.checkpoint_files import keep_files_whole, refuse_unwritable_folders
from lightning_peft.callbacks.hyperparameters import log_hyperparameters
from lightning_peft.callbacks.learning import check_optimizers, refuse_unsaved, warn_of_missing_gradients
from lightning_peft.callbacks.learning_rate import FindLearningRate, note_beginning, take_found
from lightning_peft.callbacks.loading import BUILT_PLAINLY, require_peft_module
from lightning_peft.callbacks.optimizer_names import match_resumed
from lightning_peft.callbacks.record_training import RecordTraining
from lightning_peft.callbacks.sharding import shard
from lightning_peft.callbacks.steps import after_step, before_step, check_schedule, prepare
from lightning_peft.callbacks.within_epoch import keep_gradients, note_unfinished, resume_within_epoch
from lightning_peft.core.method import Method, require_method
from lightning_peft.core.per_forward import labels_of_batch
from lightning_peft.core.problems import shortened
from lightning_peft.data.module import MIN_LENGTH, TextDataModule
from lightning_peft.data.vocabulary import agree_on_tokens
from lightning_peft.data.window import refuse_long_texts
from lightning_peft.formats.allocation import made_for
from lightning_peft.formats.base_identity import restore_vocabulary
from lightning_peft.formats.folder import load_into, read_folder
from lightning_peft.formats.reading import naming
from lightning_peft.handle import Adapter
from lightning_peft.methods.config import method_from_config, method_to_config
from lightning_peft.tasks import Task, task_from_config
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.evaluation import EvaluatedModule
from lightning_peft.tasks.generation import check_generation
from lightning_peft.tasks.optimization import (
    AUTO,
    OPTIMIZER,
    SCHEDULER,
    check_optimization,
    make_optimizer,
    make_schedule,
    spoken_schedule,
)
from lightning_peft.tasks.packing import packs
from lightning_peft.tasks.registry import task_said_by
from lightning_peft.tasks.row_attention import leave_rows
from lightning_peft.tasks.sharded_base import fill
from lightning_peft.tasks.task import Checking, Templated, Writing
from lightning_peft.tasks.token_mean import TokenMean

_LONGEST = 10**9  # tokens, more than any text has


class PeftModule(EvaluatedModule):
    """Fine-tunes a Hugging Face model: builds it, adapts it, trains, evaluates and predicts.

    Losses are normalised by the number of units (examples, or supervised tokens) of the whole optimizer step,
    over its micro-batches and ranks: gradient accumulation does not change the result.

    Args:
        model: a folder, a hub name, or a dictionary with the fields of `BaseModel`; or a model that is already
            built, which then has to be given again to ``load_from_checkpoint``.
        method: the method, or its plain values.
        task: the task, its name, or its plain values.
        optimizer: ``{"name": "AdamW", "lr": ..., ...}``: a class of ``torch.optim``, or of ``bitsandbytes.optim``
            such as ``AdamW8bit``, and its options. Without a rate the method's own is taken; with ``"auto"`` one is
            searched for before the first step, on one device; ``loraplus_lr_ratio`` makes B of LoRA learn so many
            times as fast.
        scheduler: ``{"name": "linear", "warmup": 0.06}``: one of transformers' schedules, and the share of the
            steps that warm up.
        generation: options of ``generate`` for prediction.
        check_base: refuse checkpoints that were made on another base. It is never saved: no file says so for itself.

    Attributes:
        trained_max_length: tokens that rows were cut to in training; None where it is not known. Data that is given no
            length of its own is cut there too when the adapter is evaluated or predicts.

    Raises:
        ValueError: if an optimizer, a schedule or an option is unknown.
    """

    def __init__(
        self,
        model: str | Path | dict[str, Any] | BaseModel | Module,
        method: Method | dict[str, Any],
        task: Task | str | dict[str, Any] = "text_classification",
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        *,
        check_base: bool = True,
    ) -> None:
        super().__init__()
        self.method = method_from_config(method) if isinstance(method, dict) else method
        require_method(self.method)
        self.task: Task = task_from_config(task) if isinstance(task, (str, dict)) else task
        self.optimizer = {**OPTIMIZER, **(optimizer or {})}
        self.scheduler = {**SCHEDULER, **(scheduler or {})}
        self.generation = dict(generation or {})
        self.check_base = check_base
        check_optimization(self.optimizer, self.scheduler)
        check_generation(self.generation)
        self.model: Module | None = None
        self._given = (model,) if isinstance(model, Module) else ()
        self.base = None if isinstance(model, Module) else BaseModel.of(model)
        self._processing_class: Any = None
        self.mean = TokenMean()
        self._counted: tuple[Tensor | None, Tensor | None] = (None, None)
        self._checked = False
        self._saved: set[int] = set()
        self._recording = RecordTraining(self.task.monitor, spoken_schedule(self.scheduler))
        self.trained_max_length: int | None = None
        self._save_plain_hparams()

    def _save_plain_hparams(self) -> None:
        """Plain containers only: anything else makes ``torch.load(weights_only=True)`` refuse the checkpoint."""
        values = {
            "method": method_to_config(self.method),
            "task": self.task.to_config(),
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "generation": self.generation,
        }
        if self.base is not None:
            values["model"] = self.base.to_config()
        self.save_hyperparameters(values, logger=False)

    @property
    def processing_class(self) -> Any:
        """What makes inputs ready, loaded when first asked for: a tokenizer, or for images an image processor."""
        if self._processing_class is None:
            named = [str(getattr(m, "name_or_path", "")) for m in self._given]
            spec = self.base or BaseModel(named[0])
            self.processing_class = spec.load_processing_class(self.task)
        return self._processing_class

    @processing_class.setter
    def processing_class(self, value: Any) -> None:
        # a copy: the one that was given may be in use elsewhere
        task = self.task
        self._processing_class = task.tokenizer_for(copy.copy(value)) if isinstance(task, Templated) else value

    @property
    def tokenizer(self) -> Any:
        """The `processing_class` by the name that it has where tasks are about texts."""
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.processing_class = value

    @property
    def adapter(self) -> Adapter:
        """The handle on the adapter.

        Raises:
            RuntimeError: if the model is not built yet.
        """
        if self.model is None:
            raise RuntimeError("the model is not built yet; call configure_model(), which Trainer does")
        return Adapter(self.model)

    @property
    def lr(self) -> float:
        """The optimizer's rate, by the name that Lightning's finder of rates reads and sets.

        While one is still to be found it is the method's own.
        """
        rate: float | str | None = self.optimizer.get("lr")
        return self.method.learning_rate if rate is None or isinstance(rate, str) else rate

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer["lr"] = value
        self._save_plain_hparams()

    @property
    def runs_without_padding(self) -> bool:
        """Whether the rows of a training batch are packed: the task allows it, and the adapted model keeps them apart.

        Raises:
            RuntimeError: if the model is not built yet.
        """
        return bool(getattr(self.task, "packing", False)) and packs(self.adapter.model)

    @override
    def configure_model(self) -> None:
        """Builds the model and adapts it, once."""
        if self.model is None:
            with default_dtype(torch.float32):
                self.model = self._given[0] if self._given else self._loaded()
            self.metrics = self.task.metrics()
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            agree_on_tokens(data, self.model)
            refuse_long_texts(data, self.model)
        adapt_lightning_module(self, self.method, "model")
        shard(self, self.model, self.method)
        # a base that was given may be offloaded: its parameters are on meta too, and its hooks fill them
        if self.base is not None and self.base.load_in_shards and any(p.is_meta for p in self.model.parameters()):
            fill(self.model, self.base.folder(), self.trainer.strategy.root_device)
        self._save_plain_hparams()

    def _loaded(self) -> Module:
        base = cast(BaseModel, self.base)
        if base.load_in_shards and self._device_mesh is None:
            raise ValueError(
                "model.load_in_shards=true needs a strategy that shards (trainer=fsdp); leave it out under others"
            )
        precision = "32" if self._trainer is None else str(self._trainer.precision)
        dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])
        model: Module = base.load(self.task, dtype)
        return model

    @override
    def setup(self, stage: str) -> None:
        if self._trainer is not None:
            keep_files_whole(self._trainer)
        # text and virtual tokens must fit the model's positions: said here, not in the first step
        data = getattr(self._trainer, "datamodule", None)
        length, virtual = getattr(data, "max_length", None), getattr(self.method, "num_virtual_tokens", 0)
        if length is not None and virtual and self.base is not None:
            self.base.refuse_long_texts(length, virtual, MIN_LENGTH)

    @override
    def teardown(self, stage: str) -> None:
        leave_rows(self.model)

    def forward(self, **inputs: Any) -> Any:
        """Runs the adapted model; what it takes and gives is the Hugging Face model's."""
        assert self.model is not None
        return self.model(**inputs)

    def _outputs(self, batch: dict[str, Any]) -> Any:
        # the model does not get the labels, but a method may want to know where the prompt ends
        with labels_of_batch.passing(batch.get("labels")):
            return self.task.outputs(self.model, batch)

    @override
    def _evaluate(self, batch: dict[str, Any]) -> None:
        super()._evaluate(batch)
        if isinstance(self.task, Writing):
            assert self.metrics is not None
            self.task.score_written(self.metrics, self.model, batch, self.tokenizer, **self.generation)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        total, count = self.task.loss(self._outputs(batch), batch)
        shown = total.detach() / count.clamp_min(1)
        self.log("train/loss", shown, prog_bar=True, batch_size=int(count))
        return self.mean.scaled(total, count)

    @override
    def on_after_backward(self) -> None:
        if not self._checked:
            self._checked = True
            warn_of_missing_gradients(self)

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        refuse_unsaved(optimizer, self, self._saved)
        self.mean.normalise(self.parameters(), self.trainer.accumulate_grad_batches)
        before_step(self.trainer, self.adapter)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        after_step(self.trainer, self.adapter, self.trainer.global_step + 1)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        return self.task.predict(self.model, batch, self.processing_class, **self.generation)

    @override
    def configure_optimizers(self) -> Any:
        if self.optimizer["lr"] == AUTO:
            note_beginning(self)
        optimizer = make_optimizer(self, self.optimizer, self.method.learning_rate)
        schedule = make_schedule(optimizer, self.scheduler, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def configure_callbacks(self) -> list[Callback]:
        there = self.trainer.callbacks  # type: ignore[attr-defined]
        added = [] if self._recording in there else [self._recording, Advice()]
        if self.optimizer["lr"] == AUTO and not any(isinstance(c, FindLearningRate) for c in there):
            added.append(FindLearningRate())
        return added

    @override
    def on_fit_start(self) -> None:
        self._checked = False
        match_resumed(self)
        refuse_unwritable_folders(self.trainer)
        log_hyperparameters(self.trainer, self.hparams)
        if isinstance(self.task, Checking):
            self.task.check_model(self.model)
        rank_zero_only(print_plan)(self.adapter.plan)

    @override
    def on_train_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.trained_max_length = data.max_length if isinstance(data, TextDataModule) else None
        check_optimizers(self.trainer.optimizers, self, self.adapter)
        self._saved = set()
        for optimizer in self.trainer.optimizers:
            refuse_unsaved(optimizer, self, self._saved)
        check_schedule(self.trainer, self.adapter)
        prepare(self.trainer, self, self.adapter)
        self.mean = TokenMean(*self._counted)  # what was counted while the method looked at data is of no step
        self._counted = (None, None)
        resume_within_epoch(self)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        record_in(checkpoint, self, "model")
        checkpoint[KEY]["max_length"] = self.trained_max_length
        note_unfinished(self, checkpoint)
        if "gradients" in checkpoint[KEY]:
            checkpoint[KEY]["counted"] = list(self.mean.counted)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        check_record(checkpoint, self, "model", check_base=self.check_base)
        saved = task_from_config(checkpoint["hyper_parameters"]["task"])
        if saved.to_config() != self.task.to_config():
            raise ValueError(
                f"the checkpoint's task is {saved.to_config()}, but this run's is {self.task.to_config()}; resume with "
                "the same data and labels"
            )
        if self.optimizer["lr"] == AUTO:
            take_found(self, checkpoint)
        with naming("the checkpoint's record of its adapters"):
            self.trained_max_length = _length_in(checkpoint[KEY])
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextDataModule) and not self.trainer.training and self.trainer.state.fn is not None:
            data.setup(self.trainer.state.fn.value)  # again: until here nobody knew where its rows are cut
        keep_gradients(self, checkpoint)
        self._counted = tuple(checkpoint[KEY].get("counted", (None, None)))

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Builds the module as the checkpoint says, adapts it and loads what was trained.

        Args:
            checkpoint_path: the file, an address, or an open file.
            map_location: where the tensors go.
            hparams_file: options that stand in place of the checkpoint's.
            strict: whether the tensors must be those that the module expects.
            weights_only: False also opens a file that holds more than tensors and plain values.
            **kwargs: options of the module that stand above the checkpoint's; ``check_base=False`` takes another base.

        Returns:
            The module.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, belongs to another LightningModule or base, or names no base and none is
                given.
        """
        is_local = isinstance(checkpoint_path, (str, Path)) and "://" not in str(checkpoint_path)
        if is_local and weights_only is not False:
            saved, numbers = require_peft_module(Path(checkpoint_path), kwargs)
            if cls is PeftModule and hparams_file is None and "model" not in saved.keys() | kwargs.keys():
                raise ValueError(
                    f"{checkpoint_path} names no base, since its model was given already built; give it again: "
                    "PeftModule.load_from_checkpoint(path, model=...)"
                )
            kwargs = {**_said_by(checkpoint_path, saved, kwargs, by_file=hparams_file is None), **kwargs}
        else:
            numbers = None
        with made_for(numbers):
            options = {**kwargs, **BUILT_PLAINLY}
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only is not False, **options
            )

    def save_adapter(self, path: str | Path) -> Path:
        """Exports the adapter, with what it takes to predict from the folder alone, and a model card.

        Args:
            path: a folder that holds no adapter yet.

        Returns:
            The folder.
        """
        info: dict[str, Any] = {
            "task": self.task.to_config(),
            "generation": self.generation,
            "max_length": self.trained_max_length,
        }
        if self.base is not None:
            info["model"] = self.base.to_config()
        self._recording.describe_data(self.adapter)
        # whoever loads the adapter writes conversations as it learnt them
        beside = self.tokenizer if isinstance(self.task, Templated) else None
        return self.adapter.save(path, tokenizer=beside, **info)

    @classmethod
    def from_adapter(
        cls, path: str | Path, model: str | dict[str, Any] | Module | None = None, *, check_base: bool = True
    ) -> Self:
        """Builds the base and puts an exported adapter on it.

        A folder from elsewhere is not trusted: the base that it names is loaded from safetensors alone, and code that
        comes with it is not run.

        Args:
            path: the adapter's folder.
            model: the base; None takes the one that the folder names.
            check_base: refuse a base with another fingerprint than the one it was trained on.

        Returns:
            The module, ready to predict.

        Raises:
            ValueError: if the folder does not say which task or base it belongs to, what it says cannot be, or the
                base is another one.
        """
        saved = read_folder(Path(path))
        base = model or saved.info.get("model")
        if base is None or "task" not in saved.info:
            raise ValueError(
                f"{path} does not name its task and base: it was not exported by PeftModule; build the model "
                "yourself and call load_adapter(model, path)"
            )
        if model is None:
            base = BaseModel.said_by(path, base)
        task = task_said_by(path, saved.info["task"])
        with naming(str(path)):
            module = cls(base, saved.method, task, generation=saved.info.get("generation"), check_base=check_base)
            module.trained_max_length = _length_in(saved.info)
        if saved.tokenizer is not None:
            module.tokenizer = BaseModel(str(saved.path), tokenizer=str(saved.tokenizer)).load_tokenizer()
        if module.base is not None and saved.base is not None:
            with default_dtype(torch.float32):
                module._given = (module._loaded(),)
            restore_vocabulary(*module._given, saved.base, {n for t in saved.tensors.values() for n in t.shape[:1]})
        with made_for(saved.numbers):
            module.configure_model()
        assert module.model is not None
        load_into(module.model, "default", saved, check_base=check_base)
        return module


def _length_in(said: dict[str, Any]) -> int | None:
    """The tokens to which texts were cut in training, as a file says them."""
    length = said.get("max_length")
    if length is None or (type(length) is int and MIN_LENGTH <= length <= _LONGEST):
        return length
    raise ValueError(f"max_length must be {MIN_LENGTH} to {_LONGEST:,}, or null, but it is {shortened(repr(length))}")


def _said_by(file: Any, saved: dict[str, Any], given: dict[str, Any], *, by_file: bool) -> dict[str, Any]:
    """The base that a checkpoint names, where none is given, once what it says was seen to be harmless."""
    if "check_base" in saved:
        raise ValueError(f"{file} says itself that its base need not be checked, which only its user can: check_base")
    if not by_file:
        return {}
    if "task" not in given:
        task_said_by(file, saved["task"])
    if "model" not in saved or "model" in given:
        return {}
    # plain values, which Lightning puts with the checkpoint's own
    return {"model": {k: v for k, v in asdict(BaseModel.said_by(file, saved["model"])).items() if v is not None}}
