"""The base model that is fine-tuned, and what makes its inputs ready."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.core.imitation import has_no_numbers
from lightning_peft.core.options import misfits
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.tasks.base_source import (
    CONFIG,
    EMBEDDED,
    GENERATION,
    PROCESSOR,
    SAFE_WEIGHTS,
    TOKENIZER,
    WEIGHTS,
    helpful,
    quiet,
    refuse_without,
    resolve,
    snapshot,
)
from lightning_peft.tasks.imitated_quantization import imitate_4_bits, takes_4_bits
from lightning_peft.tasks.quantization import (
    note_full_weights,
    plain_where_new,
    quantization_config,
    quantization_problem,
)
from lightning_peft.tasks.row_attention import text_config
from lightning_peft.tasks.sharded_base import empty
from lightning_peft.tasks.task import processing_auto_class
from lightning_peft.tasks.weight_files import note_stored

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightning_peft.tasks.task import Task

# what is another machine's own, or a file may not decide
_NOT_SAVED = ("activation_checkpointing", "offload_activations", "load_in_shards", "only_safetensors")
_LOADING = ("attn_implementation", "experts_implementation")
_SAID_BY_FILE: dict[str, Any] = {
    "name_or_path": str,
    "revision": str | None,
    "tokenizer": str | None,
    "config": dict[str, Any],
    "quantization": str | dict[str, Any] | None,
}
_READY = {"AutoTokenizer": TOKENIZER, "AutoImageProcessor": PROCESSOR}


@dataclass
class BaseModel:
    """A Hugging Face model to fine-tune.

    Args:
        name_or_path: a local folder or a hub name. The embedded default's hub name is served from the package of
            the ``demo`` extra, without a download.
        revision: the hub revision; None takes the newest.
        tokenizer: a folder or name for the tokenizer, or the image processor; None takes the model's.
        config: entries of the model's config that are to differ, such as ``{"attn_implementation": "eager"}``.
        activation_checkpointing: of every so many-th layer only the input is kept, and the layer is run again in the
            backward pass: 1 for every layer, 2 for every other one. 0 keeps everything: a third faster, for some
            ten times the memory of activations.
        offload_activations: keep those inputs in the host's memory until they are needed.
        quantization: ``"nf4"`` for bitsandbytes' 4-bit NormalFloat with quantized scales (QLoRA, arXiv 2305.14314),
            ``"int8"`` for its 8-bit weights (LLM.int8, arXiv 2208.07339), ``"int8_weight_only"`` for torchao's; or a
            dictionary of theirs as transformers' ``quantization_config`` takes. The head stays as it is. None keeps all
            weights.
        load_in_shards: under FSDP2 (``trainer=fsdp``) build the model without weights, and let each process read its
            own shards of them, for models that no process can hold; False loads the whole model in each process first,
            which methods need that read weights when they start, such as DoRA and PiSSA.
        only_safetensors: refuse weights in a pickle, as for a base that an adapter's folder or a checkpoint names;
            else a pickle is opened as tensors and plain values alone. Code that comes with a model is never run: build
            such a model yourself, and give it.

    Raises:
        ValueError: if ``activation_checkpointing`` is below 0, or 0 with ``offload_activations``, or ``quantization``
            is unknown or lacks its package; when the model is loaded also if it supports no checkpointing, or there is
            no device to move from.
    """

    name_or_path: str = EMBEDDED
    revision: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    activation_checkpointing: int = 0
    offload_activations: bool = False
    quantization: str | dict[str, Any] | None = None
    load_in_shards: bool = False
    only_safetensors: bool = False

    def __post_init__(self) -> None:
        every = self.activation_checkpointing
        raise_problems(
            "model",
            [
                f"activation_checkpointing must be 0, or every how many-th layer is run again, but got {every!r}"
                if not isinstance(every, int) or every < 0
                else None,
                "offload_activations=true moves what activation_checkpointing keeps; set that to 1 or more"
                if self.offload_activations and not every
                else None,
                quantization_problem(self.quantization),
                "load_in_shards=true knows no quantized weights; leave one of the two out"
                if self.load_in_shards and self.quantization is not None
                else None,
            ],
        )

    @classmethod
    def of(cls, value: str | Path | dict[str, Any] | BaseModel) -> BaseModel:
        """A specification from a name, a dictionary of the fields, or one as it is.

        Args:
            value: what the user gave.

        Raises:
            ValueError: if a field is unknown.
        """
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, str | Path):
            return cls(str(value))
        known = [f.name for f in fields(cls)]
        unknown = [k for k in value if k not in known]
        if unknown:
            raise ValueError(f"model has no field {unknown[0]!r}{nearest(unknown[0], known)}")
        return cls(**{k: v for k, v in value.items() if v is not None})

    @classmethod
    def said_by(cls, file: str | Path, value: Any) -> BaseModel:
        """The specification that an adapter's folder or a checkpoint holds, which is not to be trusted.

        Args:
            file: where it was read, for errors.
            value: what stands there, as `to_config` gave it.

        Raises:
            ValueError: if a field is unknown, of another type, or would load code.
        """
        unknown = [k for k in value if k not in _SAID_BY_FILE] if isinstance(value, dict) else [value]
        wrong = misfits(value, {k: h for k, h in _SAID_BY_FILE.items() if k in value}) if not unknown else []
        if unknown or wrong:
            raise ValueError(f"{file}: what it says of the base has another {(unknown or wrong)[0]!r} than is expected")
        chosen = {k: v for k, v in value.get("config", {}).items() if k in _LOADING}
        for key, name in chosen.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(
                    f"{file}: {key}={name!r} would fetch code from the hub, which no file may ask for; give the base "
                    "yourself (model=...)"
                )
        return cls.of({**value, "only_safetensors": True})

    def to_config(self) -> dict[str, Any]:
        """The fields that say which model it is, as plain values; what saves memory is another machine's own."""
        return {k: v for k, v in asdict(self).items() if k not in _NOT_SAVED}

    def load(self, task: Task, compute_dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Loads the model with the head that the task asks for.

        Args:
            task: the task; it names the auto-model class.
            compute_dtype: the dtype in which layers with 4-bit weights multiply; None is float32.

        Returns:
            The model, in float32 but for what is quantized, and in training mode.

        Raises:
            OSError: if the name is neither a folder nor can be fetched, or the folder lacks what is needed.
            ValueError: if transformers has no such head for the model, its config no such entry, or it comes with code
                of its own.
        """
        import torch
        import transformers

        options = {**task.model_kwargs(), **self.config}
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization, compute_dtype or torch.float32)
        if self.only_safetensors and not self.load_in_shards:  # shards are read from nothing else
            options["use_safetensors"] = True
        refuse_without(self.name_or_path, CONFIG, SAFE_WEIGHTS if self.only_safetensors else WEIGHTS)
        with helpful(self.name_or_path), quiet():
            auto, source, where = self._chosen(task, options)
            if self.load_in_shards:
                folder = snapshot(source, self.revision) if not Path(source).is_dir() else source
                model = empty(lambda: _from_config(auto, source, where, options), folder)
                if model.can_generate() and (Path(folder) / GENERATION).is_file():
                    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
            else:
                model = auto.from_pretrained(source, dtype=torch.float32, **where, **options)
        if self.quantization is not None:
            plain_where_new(model)
            note_full_weights(model, self.folder())
        if getattr(model.config, "pad_token_id", -1) is None and processing_auto_class(task) == "AutoTokenizer":
            model.config.pad_token_id = _pad_token(self.load_tokenizer())
        if self.activation_checkpointing:
            self._checkpoint_activations(model)
        # Files name the base as the user did, not where a package happens to lie on this machine
        model.config.name_or_path = self.name_or_path
        model.train()
        return model

    def build(
        self, task: Task, dtype: torch.dtype | None = None, compute_dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The model that `load` gives, made from its configuration alone: its weights are not read, so they are random.

        What the files lack, such as a new head, is known as new, as it is in a model that was loaded.

        Args:
            task: the task; it names the auto-model class.
            dtype: of its weights; None is float32.
            compute_dtype: the dtype in which layers with 4-bit weights multiply, as of `load`. Such weights are made
                where none have numbers (`imitated`); others stay as they are before they are quantized.

        Raises:
            OSError: if the name is neither a folder nor can be fetched, or has no configuration.
            ValueError: as of `load`.
        """
        import transformers

        refuse_without(self.name_or_path, CONFIG)
        options = {**task.model_kwargs(), **self.config}
        with helpful(self.name_or_path), quiet():
            auto, source, where = self._chosen(task, options)
            model: PreTrainedModel = _from_config(auto, source, where, options, dtype)
        note_stored(model, source, transformers.AutoConfig.from_pretrained(source, **where).architectures)
        if takes_4_bits(self.quantization) and has_no_numbers(next(model.parameters())):
            imitate_4_bits(model, self.quantization, compute_dtype)
        if getattr(model.config, "pad_token_id", -1) is None:
            model.config.pad_token_id = 0  # `load` takes the tokenizer's
        if self.activation_checkpointing:
            replace(self, offload_activations=False)._checkpoint_activations(model)
        return model

    def _chosen(self, task: Task, options: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
        """The auto-model class, where to load from, and how; the options get what the task needs of such a model."""
        import transformers

        source, local = resolve(self.name_or_path)
        where: dict[str, Any] = {"revision": self.revision, "local_files_only": local, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(source, **where)
        if task.peft_task_type == "CAUSAL_LM" and getattr(config, "is_decoder", None) is False:
            # An encoder such as BERT writes text only if its attention is made causal
            options.setdefault("is_decoder", True)
        auto = getattr(transformers, task.auto_class)
        _refuse_kind(self.name_or_path, config, auto)
        _refuse_entries(config, self.config)
        if task.auto_class == "AutoModel" and _has_pooler(auto._model_mapping[type(config)]):
            # The last hidden states are read before it, so what trains in it would get no gradient
            options.setdefault("add_pooling_layer", False)
        return auto, source, where

    def folder(self) -> str:
        """Where the files of the model, once it was loaded, lie: its folder, or that of the hub's cache."""
        source, _ = resolve(self.name_or_path)
        return source if Path(source).is_dir() else snapshot(source, self.revision, fetch=False)

    def _checkpoint_activations(self, model: PreTrainedModel) -> None:
        if not model.supports_gradient_checkpointing:
            raise ValueError(
                f"{type(model).__name__} supports no activation checkpointing; leave model.activation_checkpointing out"
            )
        layers = getattr(text_config(model), "num_hidden_layers", None)
        if layers is not None and self.activation_checkpointing > layers:
            raise ValueError(
                f"model.activation_checkpointing={self.activation_checkpointing} runs every so many-th layer again, "
                f"but {type(model).__name__} has {layers}; 1 takes all of them"
            )
        import torch

        if self.offload_activations and not torch.accelerator.is_available():
            raise ValueError("model.offload_activations=true moves activations off a device, but there is none")
        model.activation_checkpointing_enable(
            every_n_layers=self.activation_checkpointing, offload=self.offload_activations
        )

    def positions(self) -> int | None:
        """How many tokens the model has positions for, or None where it does not say.

        Raises:
            OSError: if the name is neither a folder nor can be fetched, or the folder lacks what is needed.
        """
        limit: int | None = getattr(self._config(), "max_position_embeddings", None)
        return limit

    def _config(self) -> Any:
        import transformers

        refuse_without(self.name_or_path, CONFIG)
        with helpful(self.name_or_path):
            source, local = resolve(self.name_or_path)
            return transformers.AutoConfig.from_pretrained(
                source, revision=self.revision, local_files_only=local, trust_remote_code=False
            )

    def refuse_long_texts(self, length: int, virtual: int, shortest: int) -> None:
        """Refuses virtual tokens and texts that together exceed the model's positions.

        Args:
            length: how many tokens the longest text may have.
            virtual: the number of virtual tokens.
            shortest: how few tokens a text may be cut to.

        Raises:
            ValueError: if they do, with what to set.
        """
        limit = self.positions()
        if limit is None or length + virtual <= limit:
            return
        fewer = f"method.num_virtual_tokens={limit - length}"
        # a text of a few tokens says nothing: then it is the prompt that is too long
        shorter = f"data.max_length={limit - virtual}" if limit - virtual >= shortest else None
        ways = [way for way in (shorter, fewer if limit > length else None) if way is not None]
        raise ValueError(
            f"{virtual} virtual tokens and max_length={length} of text exceed the model's {limit} positions; set "
            + (f"{' or '.join(ways)} or less" if ways else "both lower")
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer.

        Raises:
            OSError: if the name is neither a folder nor can be fetched, or the folder lacks what is needed.
        """
        return self._ready("AutoTokenizer")

    def load_processing_class(self, task: Task) -> Any:
        """Loads what makes a task's inputs ready: the tokenizer, or the image processor.

        Args:
            task: the task.

        Raises:
            OSError: if the name is neither a folder nor can be fetched, or the folder lacks what is needed.
        """
        return self._ready(processing_auto_class(task))

    def _ready(self, auto_class: str) -> Any:
        import transformers

        name = self.tokenizer or self.name_or_path
        revision = self.revision if self.tokenizer is None else None
        refuse_without(name, *([CONFIG] if self.tokenizer is None else []), _READY[auto_class])
        with helpful(name), quiet():
            source, local = resolve(name)
            auto = getattr(transformers, auto_class)
            return auto.from_pretrained(source, revision=revision, local_files_only=local, trust_remote_code=False)


def _from_config(
    auto: Any, source: str, where: dict[str, Any], options: dict[str, Any], dtype: torch.dtype | None = None
) -> Any:
    import torch
    import transformers

    config, left = transformers.AutoConfig.from_pretrained(source, return_unused_kwargs=True, **where, **options)
    for reading in ("ignore_mismatched_sizes", "use_safetensors"):  # which is of files alone
        left.pop(reading, None)
    return auto.from_config(config, dtype=dtype or torch.float32, **left)


def _refuse_kind(name: str, config: Any, auto: Any) -> None:
    """Refuses a model without the task's head, for which transformers lists every class that has one."""
    known = auto._model_mapping
    if type(config) in known or hasattr(config, "auto_map"):
        return
    kinds = [k.model_type for k in known if k.model_type in ("bert", "llama", "t5", "bart", "vit")]
    raise ValueError(
        f"{name!r} is a model of the kind {config.model_type!r}, for which transformers has no {auto.__name__}; the "
        f"task needs one that has, such as {' or '.join(sorted(kinds))}"
    )


def _refuse_entries(config: Any, entries: dict[str, Any]) -> None:
    """Refuses what is no entry of the model's kind of config; transformers would take it for an option of loading."""
    known = {k for k in type(config)().to_dict() if not k.startswith("_")} | {"num_labels", *_LOADING}
    known |= type(config).attribute_map.keys() | ({"rope_scaling"} if "rope_parameters" in known else set())
    known -= {"dtype", "transformers_version", "auto_map", "quantization_config"}
    unknown = [k for k in entries if k not in known]
    if unknown:
        code = "; code that comes with a model is never run: build the model yourself, and give it"
        raise ValueError(
            f"model.config: {type(config).__name__} has no entry {unknown[0]!r}"
            + (code if unknown[0] == "trust_remote_code" else nearest(unknown[0], known))
        )


def _has_pooler(kind: Any) -> bool:
    return isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    found: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found
