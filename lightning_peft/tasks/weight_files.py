"""A model's safetensors files by the names of its parameters, opened only where a tensor or a part of one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor


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


class WeightFiles:
    """The safetensors files of a folder.

    Args:
        folder: a model's folder.
        model: the model; its files may leave the name of its body out, or have it where the model has none.
    """

    def __init__(self, folder: str | Path, model: Any) -> None:
        self.prefix = f"{model.base_model_prefix}."
        self.stored: dict[str, Stored] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
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
