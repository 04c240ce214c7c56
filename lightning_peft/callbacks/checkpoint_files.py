"""Checkpoint files that are complete or absent: written beside their place first, and found again after a crash."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_peft.analysis.sizes import size
from lightning_peft.formats.reading import read_checkpoint

_SUFFIX = ".ckpt"
_OF_SHARDS = "meta.pt"  # what Lightning writes last into a folder of shards: all but the tensors


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in its own folder, onto the disk, and renames it.

    Lightning's own saving writes into the system's folder for temporary files. Where that is on another disk, as on
    most clusters, the move is a copy over the former checkpoint: a process that is killed meanwhile leaves half a file
    and nothing else.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).resolve()  # of a link, the file that it names
        content = io.BytesIO()  # a full disk is an OSError here; torch's own writer hides it behind another
        torch.save(checkpoint, content)
        try:
            _write(content.getbuffer(), target)
        except OSError as error:
            raise type(error)(error.errno, _said(error, target, content.getbuffer().nbytes)) from error

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a checkpoint of shards, which ModelParallelStrategy (trainer=fsdp) alone reads; resume "
                f"under it, or make one file: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
            )
        if options.get("weights_only") and Path(path).is_file():
            read_checkpoint(Path(path))  # which refuses what takes more memory than it has bytes, before it does
        return super().load_checkpoint(path, *args, **options)


def _write(content: memoryview, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # always the same name: what a killed process leaves is overwritten by the next one
    scratch = target.with_name(f".{target.name}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _said(error: OSError, target: Path, needed: int) -> str:
    parent = next(p for p in target.parents if p.exists())
    kept = f"; the checkpoint that was there before is whole: {target}" if target.exists() else ""
    return (
        f"the checkpoint {target} could not be written: {error.strerror} (it takes {size(needed)}, and "
        f"{size(shutil.disk_usage(parent).free)} are free){kept}"
    )


def keep_files_whole(trainer: Trainer) -> None:
    """Has a trainer write its checkpoints by `WholeFiles`, unless it was given a CheckpointIO of somebody else's.

    Args:
        trainer: the trainer, before it saves or loads.
    """
    strategy = trainer.strategy
    files: Any = strategy.checkpoint_io
    if type(files) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()
    while isinstance(files, _WrappingCheckpointIO):  # such as AsyncCheckpointIO
        if type(files.checkpoint_io) is TorchCheckpointIO:
            files._checkpoint_io = WholeFiles()
        files = files.checkpoint_io


@rank_zero_only
def refuse_unwritable_folders(trainer: Trainer) -> None:
    """Finds out before training whether checkpoints can be written where they are to go.

    Args:
        trainer: the trainer, its callbacks set up.

    Raises:
        OSError: if a file cannot be made in the folder of a checkpoint callback.
    """
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None or not _is_local_file_protocol(folder) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue
        refuse_unwritable(folder)


def refuse_unwritable(folder: str | Path) -> None:
    """Finds out whether a checkpoint can be written into a folder, which is made if it is not there.

    Args:
        folder: the folder.

    Raises:
        OSError: if no file can be made in it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        said = f"no checkpoint can be written into {folder}: {error.strerror}; choose another dirpath"
        raise type(error)(error.errno, said) from error


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of a folder that holds the most steps and is whole, whatever its name and its date.

    Lightning's own ``ckpt_path="last"`` goes by names that begin with ``last`` and by the files' dates; it takes a
    damaged file, and starts anew where a link named ``last.ckpt`` was being replaced when the process was killed.

    What is left out because it is damaged is named in a warning. So is what is there and cannot be resumed where
    nothing is found: a run never begins anew in silence beside its checkpoints.

    Args:
        folder: where checkpoints are.

    Returns:
        The path to resume from, or None if there is none, or no such folder.

    Raises:
        ValueError: if a checkpoint holds objects that are not opened, such as a ``Path`` among the hyperparameters:
            it may be the last one.

    Example:
        >>> last_checkpoint("no/such/folder") is None
        True
    """
    steps: dict[Path, tuple[int, str]] = {}
    damaged, weights = [], []
    for path in sorted(Path(folder).glob(f"*{_SUFFIX}")):
        try:
            found = read_resumable(path)
            if "loops" in found:
                steps[path] = _step(path, found), path.name
            else:
                weights.append(f"{path} holds weights alone, as save_weights_only=True leaves them")
        except (ValueError, OSError) as error:
            if isinstance(error.__cause__, UnpicklingError):
                raise ValueError(
                    f"{error}. Until then nobody can tell whether it is the last checkpoint of {folder}; if it is "
                    "none, move it away"
                ) from error
            damaged.append(str(error))
    last = max(steps, key=lambda path: steps[path], default=None)
    _warn_of_unused(last, damaged if last else [*damaged, *weights])
    return last


def _step(path: Path, checkpoint: dict[str, Any]) -> int:
    step = checkpoint.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{path} is no checkpoint of Lightning: its global_step is {step!r}")
    return step


def _warn_of_unused(last: Path | None, why: list[str]) -> None:
    if why:
        more = f"; and {len(why) - 3} more" if len(why) > 3 else ""
        instead = f"{last} is the last one that can be resumed" if last else "none is left, so the run begins anew"
        rank_zero_warn(f"{'; '.join(why[:3])}{more}: {instead}")


def read_resumable(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a folder of shards what is beside its tensors.

    Args:
        path: the file or the folder.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is no checkpoint, or not a whole one; caused by an ``UnpicklingError`` if it is whole and
            holds more than tensors and plain values.
    """
    if not path.is_dir():
        return read_checkpoint(path)
    try:
        zipfile.ZipFile(path / _OF_SHARDS).close()  # torch would read what is cut short as a file of its old kind
        found = torch.load(path / _OF_SHARDS, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file does to its reader
        raise ValueError(f"{path} is a folder, and no whole checkpoint of shards: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a folder, and no checkpoint of shards: its {_OF_SHARDS} holds no dictionary")
    return found
