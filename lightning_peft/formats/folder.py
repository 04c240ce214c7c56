"""An adapter's folder: tensors, Hugging Face's configuration where there is one, and a manifest of our own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import tree_of
from lightning_peft.core.in_place import base_tensors
from lightning_peft.core.matching import base_modules, matching, unmatched
from lightning_peft.core.method import Method, PeftFormat, PeftRepacked, Seeded
from lightning_peft.core.options import misfits
from lightning_peft.core.problems import nearest_path
from lightning_peft.core.statistics import moving_statistics
from lightning_peft.core.tree import AdapterTree
from lightning_peft.formats.base_identity import check_description, refuse_another_base
from lightning_peft.formats.card import Card
from lightning_peft.formats.hf_peft import adapter_config, has_peft_format, method_from_peft
from lightning_peft.formats.places import refuse_file, refuse_model
from lightning_peft.formats.reading import FORMAT, naming, read_json, refuse_links
from lightning_peft.formats.tensor_file import (
    TENSORS,
    Entry,
    check_entries,
    fitted,
    read_entries,
    read_tensors,
    write_tensors,
)
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.formats.writing import write_json, written_whole
from lightning_peft.methods.config import method_from_config, method_to_config

PEFT_CONFIG = "adapter_config.json"
OF_A_RUN = "adapter"  # in a run's folder, what the training exports
MANIFEST = "lightning_peft.json"
TOKENIZER = "tokenizer_config.json"

_NAMES_A_FILE = r"_files?$|_spm$"
_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_IN_MANIFEST: dict[str, Any] = {
    "format": int,
    "method": dict[str, Any],
    "base": dict[str, Any],
    "copies": list[str],
    "in_place": list[str],
    "info": dict[str, Any],
    "prepared": bool,
    "training": dict[str, Any] | None,
}


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder says, its tensors apart.

    Attributes:
        path: the folder.
        method: the method.
        copies: modules that it trained in full, or patterns of such.
        in_place: base parameters that it trained in place.
        base: the base's description, or None where the folder has none.
        info: what was written beside it, such as ``labels``.
        foreign: whether another library wrote the folder.
        tensors: shape and dtype of each tensor, by its name in the file.
        prepared: whether the data that the method asks for was seen before it was saved.
        training: how it was trained, where the folder says it.
        seeded: whether it leaves out the tensors that follow from a seed.
    """

    path: Path
    method: Method
    copies: list[str]
    in_place: list[str]
    base: dict[str, Any] | None
    info: dict[str, Any]
    foreign: bool
    tensors: dict[str, Entry]
    prepared: bool
    training: TrainingRecord | None = None
    seeded: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that was saved beside the adapter, or None."""
        return self.path if (self.path / TOKENIZER).is_file() else None

    def method_for(self, model: Module) -> Method:
        """The method with what it saved in full named, so that a base without new heads gets them too."""
        method: Any = self.method
        if not self.foreign:
            return cast(Method, replace(method, modules_to_save=self.copies or None))
        # peft lists every name that a part of some model may have, whether this one has it or not
        names = list(base_modules(model))
        copies = _naming_some(self.copies, names)
        return cast(Method, replace(method, modules_to_save=copies or None, **_there(method, names)))


def _there(method: Any, names: list[str]) -> dict[str, list[str]]:
    """The options that list modules, without the patterns that match none; all stay where nothing is left to adapt."""
    listed = {o: p for o in _PATTERNS if isinstance(p := getattr(method, o, None), list)}
    found = {o: _naming_some(patterns, names) for o, patterns in listed.items()}
    if "target_modules" in listed:
        targets = found["target_modules"] = found["target_modules"] or listed["target_modules"]
        names = matching(targets, names)
    if "exclude_modules" in listed:
        found["exclude_modules"] = _naming_some(listed["exclude_modules"], names)
    return found


def _naming_some(patterns: list[str], names: list[str]) -> list[str]:
    lost = set(unmatched(patterns, names))
    return [p for p in patterns if p not in lost]


def refuse_occupied(path: Path) -> None:
    """Refuses a folder that already holds an adapter, so that none is ever overwritten, or a model.

    Args:
        path: the folder, which need not exist.

    Raises:
        FileExistsError: if one of an adapter's or a model's files is there, or the path leads to or through a file.
    """
    refuse_file(path)
    held = [f for f in (TENSORS, PEFT_CONFIG, MANIFEST) if (path / f).exists()]
    if held:
        raise FileExistsError(f"{path} already holds an adapter ({held[0]}); choose another folder or move it away")
    refuse_model(path)


def save_folder(
    model: Module,
    name: str,
    path: Path,
    info: dict[str, Any],
    base: dict[str, Any],
    tokenizer: Any = None,
    card: Card | None = None,
) -> Path:
    """Writes an adapter; the folder appears as a whole or not at all.

    Args:
        model: the adapted model.
        name: the adapter's name.
        path: the folder.
        info: plain values for the manifest.
        base: as `base_description` gives it.
        tokenizer: a tokenizer to write beside it.
        card: its model card.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder already holds an adapter or a model, or a file is in its place.
    """
    refuse_occupied(path)
    tree = tree_of(model, name)
    tensors = file_tensors(model, tree)
    manifest = {
        "format": FORMAT,
        "method": method_to_config(tree.record.method),
        "base": base,
        "copies": tree.record.copies,
        "in_place": tree.record.in_place,
        "tensors": {k: list(t.shape) for k, t in sorted(tensors.items())},
        "info": info,
        "prepared": tree.record.prepared,
        "training": tree.record.training and tree.record.training.to_dict(),
    }
    with written_whole(path, last=(TENSORS, MANIFEST, PEFT_CONFIG)) as scratch:
        write_tensors(scratch, tensors)
        if has_peft_format(tree.record.method):
            write_json(scratch / PEFT_CONFIG, adapter_config(model, tree.record, base))
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        write_json(scratch / MANIFEST, manifest)
        if card is not None:
            card.write(scratch, beside=path)
    return path


def read_folder(path: Path) -> SavedAdapter:
    """Reads what an adapter's folder says.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if it holds no adapter.
        NotADirectoryError: if it is a file.
        ValueError: if what it says cannot be read, is of a later version, or lies elsewhere, or its method is not
            supported.
    """
    if any(os.path.lexists(path / file) for file in (MANIFEST, PEFT_CONFIG)):  # else it may be any folder
        refuse_links(path)
        for file in (TOKENIZER, "special_tokens_map.json"):  # whose entries transformers takes for the same options
            _refuse_files_elsewhere(path / file)
    if (path / MANIFEST).is_file():
        saved = read_json(path / MANIFEST, _IN_MANIFEST)
        with naming(path / MANIFEST):
            method = method_from_config(saved["method"])
            check_description(saved["base"])
            training = saved["training"] and TrainingRecord.from_dict(saved["training"])
        return SavedAdapter(
            path=path,
            method=method,
            copies=saved["copies"],
            in_place=saved["in_place"],
            base=saved["base"],
            info=saved["info"],
            foreign=False,
            tensors=read_entries(path),
            prepared=saved["prepared"],
            training=training,
        )
    if (path / PEFT_CONFIG).is_file():
        config = read_json(path / PEFT_CONFIG)
        with naming(path / PEFT_CONFIG):
            method = method_from_peft(config)
            copies = config.get("modules_to_save") or []
            if misfits({"modules_to_save": copies}, {"modules_to_save": list[str]}):
                raise ValueError(f"modules_to_save must be a list of names, but is {copies!r}")
        return SavedAdapter(
            path=path,
            method=method,
            copies=copies,
            in_place=[],
            base=None,
            info={},
            foreign=True,
            tensors=read_entries(path),
            prepared=True,
            seeded=config.get("save_projection") is False,
        )
    if path.is_file():
        raise NotADirectoryError(
            f"{path} is a file, but an adapter is a folder with {TENSORS} and {MANIFEST} or {PEFT_CONFIG}; a "
            "checkpoint is loaded by load_from_checkpoint"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} holds no adapter: there is no such folder{nearest_path(path)}")
    there = sorted(p.name for p in path.iterdir())[:8]
    if any((path / OF_A_RUN / file).is_file() for file in (MANIFEST, PEFT_CONFIG)):
        raise FileNotFoundError(f"{path} holds no adapter itself; that of a run is {path / OF_A_RUN}")
    raise FileNotFoundError(f"{path} holds no adapter ({MANIFEST} or {PEFT_CONFIG}); there is: {there}")


def _refuse_files_elsewhere(path: Path) -> None:
    """Refuses a tokenizer's configuration that names files outside its folder, which transformers would read."""
    if not path.is_file():
        return
    for key, named in read_json(path).items():
        files = named if isinstance(named, list) else [named]
        if re.search(_NAMES_A_FILE, key) and any(isinstance(f, str) and re.search(r"[/\\\\]|^\.\.$", f) for f in files):
            raise ValueError(f"{path} names {key}={named!r}, but a tokenizer's files lie beside it")


def load_into(model: Module, name: str, saved: SavedAdapter, *, check_base: bool = True) -> None:
    """Fills a freshly injected adapter from its folder; everything is checked before anything is written.

    Args:
        model: the adapted model.
        name: the adapter's name.
        saved: what the folder says.
        check_base: whether another base is refused.

    Raises:
        ValueError: if the base is another one, or a tensor is missing, unexpected, of another shape or not finite.
        FileNotFoundError: if the tensors are missing.
    """
    if check_base and saved.base is not None:
        refuse_another_base(model, saved.base, f"{saved.path} was trained")
    tree = tree_of(model, name)
    method = tree.record.method
    seeded = method.seeded if saved.seeded and isinstance(method, Seeded) else ()
    absent = set(_file_names(model, tree, seeded).values())
    live = _live_tensors(model, tree)
    packed = _packed(method, live)
    names = _file_names(model, tree, packed)
    wanted = {names[k]: t for k, t in packed.items() if names[k] not in absent}
    projected = " (it was saved with save_projection=False; save it in peft with True)" if saved.seeded else ""
    if saved.foreign:
        _refuse_too_much(model, saved, wanted)
        stored = _without_repeats(model, read_tensors(saved.path), set(wanted))
        check_entries(saved.path, stored, wanted, if_missing=projected)
    else:
        check_entries(saved.path, saved.tensors, wanted)
        stored = read_tensors(saved.path)
    stored = fitted(saved.path, stored, wanted)
    own = {k: stored[n] for k, n in names.items() if n not in absent}
    if isinstance(method, PeftRepacked):
        own = method.from_peft(own)
    _refuse_places_outside(saved.path, tree, own)
    with torch.no_grad():
        for key, tensor in live.items():
            if key not in seeded:  # which the seed gave when the layers were made
                tensor.copy_(own[key])
    tree.record.prepared = saved.prepared
    tree.record.training = saved.training


def _refuse_places_outside(path: Path, tree: AdapterTree, own: dict[str, Tensor]) -> None:
    """Refuses places beyond what they are in: nothing would notice before a GPU reads there."""
    for place, layer in tree.layers_by_module.items():
        for leaf, limits in layer.index_limits().items():
            rows = own[f"{place}.{leaf}" if place else leaf]
            # a layer whose places were to be found by data may have been saved before it saw any
            waiting = bool((rows == -1).all()) and bool((layer.get_buffer(leaf) == -1).all())
            inside = all(int(r.min()) >= 0 and int(r.max()) < n for r, n in zip(rows, limits, strict=True) if len(r))
            if not (waiting or inside):
                raise ValueError(f"{path / TENSORS}: {leaf} of {place!r} has places outside of {limits}")


def _live_tensors(model: Module, tree: AdapterTree) -> dict[str, Tensor]:
    own = tree.state_dict(keep_vars=True)
    in_place = tree.record.in_place
    if not in_place:
        return own
    base = base_tensors(model)
    return own | {n: base[n] for n in (*in_place, *moving_statistics(model, in_place))}


def _packed(method: Method, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return method.to_peft(tensors) if isinstance(method, PeftRepacked) else tensors


def _file_names(model: Module, tree: AdapterTree, keys: Iterable[str]) -> dict[str, str]:
    method = tree.record.method
    if isinstance(method, PeftFormat) and has_peft_format(tree.record.method):
        return {k: method.peft_name(k, model) for k in keys}
    return {k: k for k in keys}


def file_tensors(model: Module, tree: AdapterTree) -> dict[str, Tensor]:
    """What the file holds, by the names there.

    Args:
        model: the adapted model.
        tree: the adapter.
    """
    tensors = _packed(tree.record.method, _live_tensors(model, tree))
    names = _file_names(model, tree, tensors)
    return {names[k]: t for k, t in tensors.items()}


def _refuse_too_much(model: Module, saved: SavedAdapter, wanted: dict[str, Tensor]) -> None:
    """Refuses a file that has more than its adapter and the base, of which peft writes some once for each layer."""
    own, base = (sum(t.numel() for t in tensors) for tensors in (wanted.values(), base_tensors(model).values()))
    most = max(2, len(wanted)) * own + 2 * base
    if saved.numbers > most:
        raise ValueError(
            f"{saved.path / TENSORS} holds {saved.numbers:,} numbers, but the adapter and its base have {most:,} at "
            "most: it does not fit this model"
        )


def _without_repeats(model: Module, stored: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Leaves out what peft writes twice: an embedding's base weights, tensors that layers share."""
    base = {f"base_model.model.{k}": t for k, t in base_tensors(model).items()}
    kept: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        # with bias="all" peft also writes a saved module's biases under its wrapper's inner names
        if ".original_module." in key or key.replace(".modules_to_save.", ".") in stored.keys() - {key}:
            continue
        if key not in expected:
            twins = expected & stored.keys() & {f"base_model.{key.rpartition('.')[2]}", *_at_tied_modules(model, key)}
            if any(torch.equal(stored[t], tensor) for t in twins):
                continue
        own = base.get(key.replace(".base_layer.", "."))
        if key in expected or own is None or not torch.equal(own.detach().cpu().to(tensor.dtype), tensor):
            kept[key] = tensor
    return kept


def _at_tied_modules(model: Module, key: str) -> list[str]:
    """What a PEFT file would call the same tensor at the modules that share this one's weight."""
    place, _, leaf = key.removeprefix("base_model.model.").rpartition(".")
    weights = {n: m._parameters.get("weight") for n, m in model.named_modules(remove_duplicate=False)}
    weight = weights.get(place)
    others = [n for n, w in weights.items() if weight is not None and w is weight and n != place]
    return [f"base_model.model.{n}.{leaf}" for n in others]
