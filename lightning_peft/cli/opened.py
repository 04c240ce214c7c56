"""An adapter's folder or checkpoint, opened: what its files say, and the adapter on its base where that can be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.callbacks.adaptation import record_of
from lightning_peft.cli.commands import load
from lightning_peft.core.method import Method, PeftRepacked
from lightning_peft.core.problems import nearest_path, shortened
from lightning_peft.formats.folder import PEFT_CONFIG, SavedAdapter, read_folder
from lightning_peft.formats.reading import naming, read_checkpoint, read_json
from lightning_peft.formats.tensor_file import TENSORS, Entry, fitted, read_tensors
from lightning_peft.handle import Adapter, load_adapter
from lightning_peft.methods.config import method_from_config
from lightning_peft.tasks import Task, task_from_config
from lightning_peft.tasks.base_model import BaseModel

# Hugging Face PEFT's task_type, the task with the same head, and whether that has labels
_TASKS = {
    "SEQ_CLS": ("text_classification", True),
    "TOKEN_CLS": ("token_classification", True),
    "CAUSAL_LM": ("causal_lm", False),
    "SEQ_2_SEQ_LM": ("seq2seq", False),
    "FEATURE_EXTRACTION": ("embedding", False),
    None: ("embedding", False),
}


@dataclass(frozen=True)
class Opened:
    """What the files of an adapter say.

    Attributes:
        path: the folder or checkpoint.
        method: its method.
        base: ``name`` and ``fingerprint`` of the base, where it says them.
        tensors: the adapter's tensors, by their names in a folder's file.
        size: bytes on the disk: of the tensors and of what says how they are read.
        saved: what the folder says; None of a checkpoint.
    """

    path: Path
    method: Method
    base: dict[str, Any]
    tensors: dict[str, Tensor]
    size: int
    saved: SavedAdapter | None

    @property
    def entries(self) -> dict[str, Entry]:
        """Shape and dtype of each tensor."""
        return {n: Entry(tuple(t.shape), t.dtype) for n, t in self.tensors.items()}


def opened(path: str) -> Opened:
    """Reads an adapter's files, without its base.

    Args:
        path: a folder, or a checkpoint with one adapter.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if a file is damaged, or a number is not finite.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint or folder{nearest_path(place)}")
    return _checkpoint(place)


def _folder(path: Path) -> Opened:
    saved = read_folder(path)
    tensors = read_tensors(path)
    fitted(path, tensors, tensors)  # which refuses numbers that are not finite
    config = read_json(path / PEFT_CONFIG) if (path / PEFT_CONFIG).is_file() else {}
    said = saved.base or {"name": config.get("base_model_name_or_path"), "fingerprint": None}
    return Opened(
        path=path,
        method=saved.method,
        base={k: said[k] for k in ("name", "fingerprint")},
        tensors=dict(sorted(tensors.items())),
        size=sum(p.stat().st_size for p in path.iterdir() if p.name == TENSORS or p.suffix == ".json"),
        saved=saved,
    )


def _checkpoint(path: Path) -> Opened:
    checkpoint = read_checkpoint(path)
    with naming(path):
        record = record_of(checkpoint)
        if len(record["methods"]) != 1:
            raise ValueError(f"it holds the adapters {sorted(record['methods'])}; export one of them to a folder")
        ((name, options),) = record["methods"].items()
        method = method_from_config(options)
    root = f"{record['model']}." if record["model"] else ""
    own: dict[str, Tensor] = {}
    for key in record["tensors"]:
        if key not in checkpoint["state_dict"]:
            raise ValueError(f"{path} lacks {key}, which it lists")
        own[key.removeprefix(root).removeprefix(f"adapters.{name}.")] = checkpoint["state_dict"][key]
    fitted(path, own, own)
    return Opened(
        path=path,
        method=method,
        base={k: record["base"][k] for k in ("name", "fingerprint")},
        tensors=method.to_peft(own) if isinstance(method, PeftRepacked) else own,
        size=path.stat().st_size,
        saved=None,
    )


def on_base(found: Opened, base: str | None, *, check_base: bool) -> tuple[Adapter | None, str | None]:
    """The adapter on its base.

    Args:
        found: the adapter's files.
        base: a folder or a name on the hub; None takes what the files name.
        check_base: refuse another base than the one it was trained on.

    Returns:
        The adapter, or None; and then why, in words that stand behind "without its base".

    Raises:
        OSError: if the base that was given cannot be had.
        ValueError: if the adapter does not fit the base.
    """
    try:
        if _is_whole(found):
            module = load(str(found.path), base, check_base=check_base)
            spec = module.base
            return module.adapter if spec is None else _with_originals(module.adapter, spec, module.task), None
        if found.saved is None:
            return None, "the checkpoint is of a LightningModule of your own; export its adapter by Adapter.save"
        return _on_a_model(found.saved, base, check_base=check_base)
    except OSError as error:
        if base is not None:
            raise
        return None, shortened(str(error), 300)


def _is_whole(found: Opened) -> bool:
    """Whether the files name task and base as `PeftModule` writes them."""
    if found.saved is not None:
        return "task" in found.saved.info
    options = read_checkpoint(found.path).get("hyper_parameters", {})
    return isinstance(options, dict) and {"method", "task"} <= options.keys()


def _on_a_model(saved: SavedAdapter, base: str | None, *, check_base: bool) -> tuple[Adapter | None, str | None]:
    """On the model that Hugging Face PEFT's configuration describes."""
    config = read_json(saved.path / PEFT_CONFIG) if (saved.path / PEFT_CONFIG).is_file() else {}
    named = config.get("base_model_name_or_path")
    if base is None and named is None:
        return None, "the folder names no base; give it with base=..."
    task = _task(config.get("task_type"), saved)
    if task is None:
        return None, f"no model is known for task_type={config.get('task_type')!r}"
    spec = BaseModel(base) if base is not None else BaseModel.said_by(saved.path, {"name_or_path": named})
    adapter = load_adapter(spec.load(task).eval(), saved.path, check_base=check_base)
    return _with_originals(adapter, spec, task), None


def _with_originals(adapter: Adapter, base: BaseModel, task: Task) -> Adapter:
    """The adapter; where it trained in place and kept no originals, with those of the base's own files.

    Those that were enlarged before the training have no start of the same shape, and are left out.
    """
    record = adapter.tree.record
    if record.in_place and record.originals is None:
        plain, now = dict(base.load(task).named_parameters()), dict(adapter.model.named_parameters())
        record.originals = {n: plain[n].detach() for n in record.in_place if plain[n].shape == now[n].shape}
    return adapter


def _task(kind: Any, saved: SavedAdapter) -> Task | None:
    """A task with the head that a ``task_type`` of PEFT's stands for."""
    if kind not in _TASKS:
        return None
    name, labelled = _TASKS[kind]
    copied = [e.shape for n, e in saved.tensors.items() if len(e.shape) == 2 and any(c in n for c in saved.copies)]
    labels = [str(i) for i in range(min((shape[0] for shape in copied), default=2))]
    return task_from_config({"name": name, **({"labels": labels} if labelled else {})})
