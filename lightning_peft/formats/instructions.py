"""What the instructions of a checkpoint would call and build, found out before any of them is carried out.

A file that ``torch.save`` wrote is a list of instructions for a small machine with a stack. torch's
``weights_only=True`` lets it call a few functions, among them such that take memory which is nowhere in the file:
``bytearray(2**31)``, a set of a long list that stands there once and is named a thousand times. Here the same list is
gone through with the sizes of the values in place of the values.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_safe_globals

_CALLED = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.complex",
        "_codecs.encode",  # which bytes are written with
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
    }
)
"""The functions by which ``torch.save`` writes dense tensors and plain values."""

_DTYPES = frozenset(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_PLAIN = ("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT")
_EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE")

_ENOUGH = 2**62  # more than any file has


@dataclass(eq=False)
class _Size:
    """A value on the stack: its length with all that was in it when it was put there, in bytes or entries."""

    length: int = 0
    parts: list[_Size] = field(default_factory=list)
    """What a tuple consists of."""
    name: str = ""
    """What is meant by it, if it is a function or a class."""


def refuse_instructions(path: Path) -> None:
    """Refuses a checkpoint whose instructions call what ``torch.save`` does not, or build more than they hold.

    What was allowed by ``torch.serialization.add_safe_globals`` is called whatever it is.

    Args:
        path: the file, a zip archive in which nothing is packed.

    Raises:
        ValueError: if it does; caused by an ``UnpicklingError`` if it is whole and calls more.
        RuntimeError: if the archive is damaged.
    """
    content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # where torch.load looks
    trusted = {f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}" for f in get_safe_globals()}
    _Machine(path, trusted).run(content)


class _Machine:
    """The stack on which a pickle's instructions work."""

    def __init__(self, path: Path, trusted: set[str]) -> None:
        self.path = path
        self.called = _CALLED | trusted
        self.named = self.called | _DTYPES
        self.stack: list[_Size] = []
        self.below: list[list[_Size]] = []
        self.kept: dict[Any, _Size] = {}
        self.copied = 0
        self.others: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING", "LONG1"), self._written),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda place: self.stack.append(self.kept[place])),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._keep),
            **dict.fromkeys(("REDUCE", "NEWOBJ"), self._call),
            "GLOBAL": lambda named: self.stack.append(self._named(*named.split(" "))),
            "MARK": self._mark,
            "BUILD": lambda _: self.stack.pop(),
            "BINPERSID": self._storage,
        }

    def run(self, content: bytes) -> None:
        for instruction, argument, _ in pickletools.genops(content):
            self._do(instruction.name, argument)
            tuples = [value.length for value in self.stack[-1:] if value.parts]
            # a file has each value once: who names one again and again has it copied, or compared, as often
            if max(self.copied, *tuples, 0) > len(content):
                raise ValueError(
                    f"{self.path} repeats its values so often that they take more room than its {len(content):,} bytes "
                    "of instructions; torch.save writes no such file"
                )

    def _do(self, name: str, argument: Any) -> None:
        if name in _PLAIN or name in _EMPTY:
            self.stack.append(_Size())
        elif name.startswith("TUPLE"):
            self._tuple(self._since_mark() if name == "TUPLE" else self._taken(int(name[-1])))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._put(name)
        elif name in self.others:
            self.others[name](argument)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"{self.path} has an instruction that torch.save does not write: {name}")

    def _written(self, value: Any) -> None:
        self.stack.append(_Size(len(value) if isinstance(value, (str, bytes)) else 0))

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _storage(self, _: Any) -> None:
        self.stack[-1] = _Size()  # a tensor's bytes, which the file has

    def _keep(self, place: int) -> None:
        self.kept[place] = self.stack[-1]

    def _named(self, module: str, name: str) -> _Size:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if full not in self.named and not is_storage:
            raise ValueError(
                f"{self.path} holds an object of {full.removeprefix('builtins.')}, but only tensors and plain values "
                "are opened, of tensors the dense ones; keep it out of hyperparameters and callbacks' states, or allow "
                "it by torch.serialization.safe_globals if you trust the file"
            ) from UnpicklingError(f"{full} is not called")
        return _Size(name=full)

    def _taken(self, count: int) -> list[_Size]:
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def _since_mark(self) -> list[_Size]:
        found, self.stack = self.stack, self.below.pop()
        return found

    def _tuple(self, parts: list[_Size]) -> None:
        self.stack.append(_Size(sum(1 + p.length for p in parts), parts))

    def _put(self, name: str) -> None:
        items = self._since_mark() if name.endswith("S") else self._taken(1 if name == "APPEND" else 2)
        added = sum(1 + item.length for item in items)
        self.stack[-1].length = min(self.stack[-1].length + added, _ENOUGH)
        if name.startswith("SETITEM"):  # to find a key its parts are looked at
            self.copied += sum(key.length for key in items[::2] if key.parts)

    def _call(self, _: Any) -> None:
        given, called = self.stack.pop(), self.stack.pop()
        if called.name not in self.called:
            raise ValueError(f"{self.path} has {called.name or 'a value'} called, which torch.save never does")
        self.copied += sum(part.length for part in given.parts)
        self.stack.append(_Size())
