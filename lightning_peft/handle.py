"""The library's face without Lightning: adapt a model, hold on to its adapter, save it and load it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor
from torch.nn import Module, Parameter
from typing_extensions import override

from lightning_peft.analysis.card import card_of
from lightning_peft.analysis.plan import Plan, plan_of
from lightning_peft.core.activation import activate, set_trainable
from lightning_peft.core.adapters import adapters_of, require_adapters, tree_of
from lightning_peft.core.collector import paused_collector
from lightning_peft.core.disable import disabled
from lightning_peft.core.inject import eject, inject
from lightning_peft.core.matching import is_within
from lightning_peft.core.merge import merge, unmerge
from lightning_peft.core.method import DataDriven, Method, Scheduled, require_method
from lightning_peft.core.mode import evaluating
from lightning_peft.core.problems import an
from lightning_peft.core.sharded import refuse_sharded
from lightning_peft.core.tree import AdapterTree
from lightning_peft.formats.allocation import bounded, made_for
from lightning_peft.formats.base_identity import base_description, refuse_another_vocabulary
from lightning_peft.formats.folder import load_into, read_folder, save_folder
from lightning_peft.formats.merged import save_merged, unload_merged
from lightning_peft.formats.reading import naming
from lightning_peft.formats.serving import DEFAULT_MAX_LORA_RANK, save_for


class Adapter:
    """A handle on one adapter of a model. It holds nothing of its own: several may exist, and all agree.

    Args:
        model: the adapted model.
        name: the adapter's name.

    Raises:
        ValueError: if the model has no such adapter.
    """

    def __init__(self, model: Module, name: str = "default") -> None:
        require_adapters(model, [name])
        self.model = model
        self.name = name

    @override
    def __repr__(self) -> str:
        adapters = adapters_of(self.model)
        there = adapters is not None and self.name in adapters
        what = repr(self.method) if there else "removed"
        return f"Adapter({self.name!r}, {what}, of {type(self.model).__name__})"

    @property
    def tree(self) -> AdapterTree:
        """The adapter itself: a module whose layers carry the names of the modules that they adapt.

        Raises:
            RuntimeError: if it has been removed.
        """
        self._require()
        return tree_of(self.model, self.name)

    def _require_whole(self, call: str) -> None:
        self._require()
        refuse_sharded(self.model, call)

    def _require(self) -> None:
        adapters = adapters_of(self.model)
        if adapters is None or self.name not in adapters:
            raise RuntimeError(f"the adapter {self.name!r} has been removed from the model")

    @property
    def method(self) -> Method:
        """The method that it was made by."""
        return self.tree.record.method

    @property
    def plan(self) -> Plan:
        """What trains where, and what share of the model that is."""
        return plan_of(self.model, self.name)

    def parameters(self) -> list[Parameter]:
        """Everything that the adapter trains, the base's own parameters of selective methods included."""
        named = dict(self.model.named_parameters())
        own = [p for p in self.tree.parameters() if p.requires_grad]
        return [*own, *(named[n] for n in self.tree.record.in_place if named[n].requires_grad)]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Lets the adapter train, or rest: an active adapter that rests runs and gets no gradients.

        Adding, removing, activating and disabling adapters leave this as it is.

        Args:
            requires_grad: whether it trains.

        Returns:
            The handle.
        """
        self._require()
        set_trainable(self.model, self.name, requires_grad)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, base parameters that train in place included."""
        named = dict(self.model.named_parameters())
        return {**self.tree.state_dict(), **{n: named[n].detach() for n in self.tree.record.in_place}}

    @property
    def needs_data(self) -> bool:
        """Whether `prepare` is still to be called before the first training step."""
        return isinstance(self.method, DataDriven) and self.method.needs_data and not self.tree.record.prepared

    def prepare(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Lets a data-driven method see training data, once, before the optimizer's first step.

        With Lightning it happens by itself. The model runs in evaluation mode for as long as it takes.

        Args:
            losses: a callable for each batch, which runs the model on it and gives the loss. It may be lazy: a
                method that has seen enough stops.

        Raises:
            RuntimeError: if the adapter looks at no data, or has done so.

        Example:
            ``adapter.prepare((lambda b=b: model(**b).loss) for b in loader)``
        """
        method = self.method
        if not self.needs_data:
            raise RuntimeError(f"the adapter {self.name!r} looks at no data, or has seen it: {method!r}")
        assert isinstance(method, DataDriven)
        with evaluating(self.model):
            method.prepare(self.model, self.tree, losses)
        self.tree.record.prepared = True

    @property
    def scheduled(self) -> Scheduled | None:
        """The method if it acts around steps, and the adapter trains; else None."""
        acts = isinstance(self.method, Scheduled) and self.method.scheduled and self.tree.record.resting is None
        return cast(Scheduled, self.method) if acts else None

    def before_step(self, step: int, total: int) -> None:
        """To be called between ``backward()`` and ``optimizer.step()``; with Lightning it happens by itself.

        Args:
            step: the number of this step, from 1.
            total: how many steps the training has.
        """
        if self.scheduled is not None:
            self.scheduled.before_step(self.model, self.tree, step, total)

    def after_step(self, step: int, total: int) -> None:
        """To be called between ``optimizer.step()`` and ``zero_grad()``; with Lightning it happens by itself.

        Args:
            step: the number of this step, from 1.
            total: how many steps the training has.
        """
        if self.scheduled is not None:
            self.scheduled.after_step(self.model, self.tree, step, total)

    def activate(self) -> None:
        """Makes this the only active adapter; which parameters train stays as it is.

        Raises:
            ValueError: if it is merged.
        """
        self._require()
        activate(self.model, self.name)

    def disabled(self) -> AbstractContextManager[None]:
        """A ``with`` block in which the model is the base.

        Raises:
            RuntimeError: on entering, if the method kept no originals of what it trains in place.
        """
        return disabled(self.model)

    def remove(self) -> Module:
        """Takes the adapter out of the model.

        Returns:
            The model; after its last adapter it is the base again, names, classes and values.

        Raises:
            RuntimeError: if the method kept no originals of what it trains in place, or merging kept none.
        """
        self._require_whole("remove()")
        unmerge(self.model, self.name)
        eject(self.model, self.name)
        # importing it takes seconds, and no model's attention takes rows before it was imported
        if rows := sys.modules.get("lightning_peft.tasks.row_attention"):
            rows.leave_rows(self.model)
        return self.model

    def merge(self, *, keep_originals: bool = True) -> None:
        """Adds the adapter's change to the weights; the outputs stay, the extra work goes.

        Args:
            keep_originals: let the original weights wait on the CPU, so that `unmerge` gives them back to the bit.
                False frees their memory, and there is no way back; `Plan.merge_bytes` says how much it is.

        Raises:
            ValueError: if the method is no change of weights, a value is not finite, or another active adapter
                runs inside this one.
        """
        self._require_whole("merge()")
        merge(self.model, self.name, keep_originals=keep_originals)

    def unmerge(self) -> None:
        """Undoes `merge`, to the bit; the adapter is active again.

        Raises:
            ValueError: if another adapter was merged over it; unmerge that first.
            RuntimeError: if the originals were not kept.
        """
        self._require_whole("unmerge()")
        unmerge(self.model, self.name)

    def merge_and_unload(self) -> Module:
        """Merges for good and takes all adapters out.

        Others that were merged with ``keep_originals=False`` stay in the weights; those that do nothing are dropped.

        Returns:
            The model, a plain one with changed weights.

        Raises:
            ValueError: if the method cannot be merged, or another adapter is active, is merged and could be unmerged,
                or trains the base in place; nothing is changed then.
        """
        self._require_whole("merge_and_unload()")
        unload_merged(self.model, self.name)
        return self.model

    @paused_collector()
    def save(self, path: str | Path, tokenizer: Any = None, **info: Any) -> Path:
        """Writes the adapter and its model card into a folder, in Hugging Face PEFT's format where that has the method.

        Args:
            path: a folder that holds no adapter yet; it is made if it does not exist. A README.md that it has is kept,
                and then no card is written.
            tokenizer: a tokenizer to write beside it, with its chat template.
            **info: plain values for the folder's manifest, such as ``labels``.

        Returns:
            The folder.

        Raises:
            FileExistsError: if the folder already holds an adapter or a model, or a file is in its place.
        """
        self._require_whole("save()")
        base = base_description(self.model, [self.name])
        card = card_of(self.model, self.name, path, info=info, base=base)
        return save_folder(self.model, self.name, Path(path), info, base, tokenizer, card)

    def save_merged(self, path: str | Path, processing_class: Any = None) -> Path:
        """Writes the whole model with the adapter merged, for plain transformers, with a model card.

        The model in memory stays adapted as it is.

        Args:
            path: a folder that does not exist yet, or is empty.
            processing_class: a tokenizer or an image processor to write beside it.

        Returns:
            The folder.

        Raises:
            TypeError: if the model has no ``save_pretrained``.
            ValueError: if the method cannot be merged, or another adapter acts and could be taken back.
            FileExistsError: if the folder holds something, or a file is in its place.
        """
        self._require_whole("save_merged()")
        card = card_of(self.model, self.name, path, "merged", processing_class=processing_class)
        return save_merged(self.model, self.name, Path(path), processing_class, card)

    def save_for(self, consumer: str, path: str | Path, *, max_lora_rank: int = DEFAULT_MAX_LORA_RANK) -> Path:
        """Writes the adapter as a server of language models reads it: a plain LoRA of one rank and one strength.

        Patterns of ranks and strengths, starts from the weight and, where it is not known, rsLoRA are converted;
        what cannot be said so is refused before anything is written.

        Args:
            consumer: ``"vllm"``, or ``"gguf"`` for llama.cpp's ``convert_lora_to_gguf.py``.
            path: a folder that holds no adapter yet.
            max_lora_rank: the highest rank that the vLLM server is started for (``--max-lora-rank``).

        Returns:
            The folder.

        Raises:
            ValueError: if the consumer is unknown or cannot hold the adapter.
            FileExistsError: if the folder already holds an adapter.
        """
        self._require_whole("save_for()")
        card = card_of(self.model, self.name, path, consumer)
        return save_for(consumer, self.model, self.name, Path(path), max_lora_rank=max_lora_rank, card=card)

    def print_trainable_parameters(self) -> None:
        """Prints how much trains of how much."""
        print(self.plan.summary)


def adapt(model: Module, method: Method, name: str = "default") -> Adapter:
    """Adapts a model in place: freezes it and puts the method's layers around its modules.

    Args:
        model: any module.
        method: what to do, such as ``LoRA(r=8)``.
        name: the adapter's name.

    Returns:
        The handle.

    Raises:
        TypeError: if the model is no module or the method no method.
        ValueError: if the method does not fit the model; nothing is changed then.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import LoRA
        >>> adapter = adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), LoRA(r=2))
        >>> adapter.plan.trainable
        52
    """
    if not isinstance(model, Module):
        got = f"the class {model.__name__} itself" if isinstance(model, type) else an(type(model).__name__)
        raise TypeError(f"adapt works on a torch.nn.Module, but got {got}")
    require_method(method)
    inject(model, method, name)
    return Adapter(model, name)


@paused_collector()
def load_adapter(model: Module, path: str | Path, name: str = "default", *, check_base: bool = True) -> Adapter:
    """Puts a saved adapter into a model; folders written by Hugging Face's ``peft`` load too.

    Args:
        model: the base that the adapter was trained on.
        path: the adapter's folder.
        name: the name that it gets here.
        check_base: refuse a base with another fingerprint than the one it was trained on.

    Returns:
        The handle.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        NotADirectoryError: if the path is a file's.
        ValueError: if a file is damaged, the base is another one, or a tensor is missing, unexpected, of another shape
            or not finite; the model is left as it was.
    """
    saved = read_folder(Path(path))
    if check_base and saved.base is not None:
        refuse_another_vocabulary(model, saved.base, f"{path} was trained")
    with naming(path):
        method = saved.method_for(model)
    with naming(path), made_for(saved.numbers), bounded(model, method):
        # active when its numbers are there: another thread may be serving the model
        tree = inject(model, method, name, also_in_place=saved.in_place, saved=True, active=False)
    record = tree.record
    if not saved.foreign and all(any(is_within(n, [c]) for n in record.new) for c in record.copies):
        # heads that are new here too are copied without being asked for, as they were there
        record.method.modules_to_save = saved.method.modules_to_save
    try:
        load_into(model, name, saved, check_base=check_base)
    except BaseException:
        # nothing was written yet, so nothing is lost by taking out what kept no originals
        record = tree_of(model, name).record
        record.originals = record.originals or {}
        eject(model, name)
        raise
    activate(model, name)
    return Adapter(model, name)
