"""A model's safetensors files by the names of its parameters, opened only where a tensor or a part of one is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a parameter's numbers lie: the file, and the name and the shape there. It can be copied and pickled."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, part: tuple[slice, ...] = ()) -> Tensor:
        """The parameter, or a part of it; the rest stays on disk.

        Args:
            part: a slice for each dimension; none for all of it.
        """
        with safe_open(self.path, framework="pt") as opened:
            tensor: Tensor = opened.get_slice(self.name)[part] if part else opened.get_tensor(self.name)
        return tensor


def weight_paths(folder: str | Path) -> list[Path]:
    """The safetensors files that transformers would read from a folder, whether they are there yet or not.

    Others may lie beside them: an adapter's, or the same weights in their maker's own format.

    Args:
        folder: a model's folder.

    Returns:
        `SINGLE`, or else what `INDEX` names, or nothing.

    Raises:
        ValueError: if the index is damaged, or names files outside the folder.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map from parameters to files") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no safetensors file beside it")
    return [folder / name for name in names]


class WeightFiles:
    """The safetensors files of a folder that hold a model, see `weight_paths`.

    Args:
        folder: a model's folder.
        model: the model; its files may leave the name of its body out, or have it where the model has none.
    """

    def __init__(self, folder: str | Path, model: Any) -> None:
        self.prefix = f"{model.base_model_prefix}."
        self.stored: dict[str, Stored] = {}
        for path in filter(Path.is_file, weight_paths(folder)):
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    self.stored[name] = Stored(path, name, tuple(opened.get_slice(name).get_shape()))

    def find(self, name: str) -> Stored | None:
        """Where a parameter lies, or None where the files have it under another name or not at all.

        Args:
            name: the parameter's name in the model.
        """
        for known in (name, name.removeprefix(self.prefix), f"{self.prefix}{name}"):
            if known in self.stored:
                return self.stored[known]
        return None


def note_stored(model: Any, folder: str | Path, architectures: Sequence[str] | None) -> None:
    """Marks parameters of a model that was built from a configuration, as transformers marks those that it loads.

    Args:
        model: the model.
        folder: where its weights may lie; a hub name has none here.
        architectures: the classes that the configuration was written for. They tell which part of the model is new
            where there are no weights: all outside of its body, if its class is another.
    """
    files = WeightFiles(folder, model)
    own = architectures is None or type(model).__name__ in architectures
    for name, parameter in model.named_parameters():
        stored = files.find(name)
        if files.stored:
            parameter._is_hf_initialized = stored is not None and stored.shape == tuple(parameter.shape)
        else:
            parameter._is_hf_initialized = own or name.startswith(files.prefix)
