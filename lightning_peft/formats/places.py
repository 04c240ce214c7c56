"""Where a folder may be written: not in the place of a file, and an adapter not beside a model."""

from __future__ import annotations

from pathlib import Path

_PARTS_OF_A_MODEL = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def refuse_file(path: Path) -> None:
    """Refuses a path at which no folder can be, because it or a part of it is a file.

    Args:
        path: where a folder is to be.

    Raises:
        FileExistsError: if there is a file.
    """
    file = next((p for p in (path, *path.parents) if p.is_file()), None)
    if file is not None:
        raise FileExistsError(f"{path} cannot be a folder, for {file} is a file; choose another folder")


def refuse_model(path: Path) -> None:
    """Refuses a base model's folder: with ``adapter_config.json`` in it, transformers takes it for an adapter's.

    Args:
        path: where an adapter is to be, which need not exist.

    Raises:
        FileExistsError: if a model's configuration or weights are there.
    """
    beside = [f for f in _PARTS_OF_A_MODEL if (path / f).exists()]
    if beside:
        raise FileExistsError(
            f"{path} holds a model ({', '.join(beside)}), and with an adapter's files beside them transformers would "
            "take it for an adapter; choose another folder"
        )
