"""Images where they lie: read when a batch needs them, and looked at once beforehand."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # EXIF's tag; from 5 on the camera was held sideways


@dataclass(frozen=True, slots=True)
class Seen:
    """What looking at an image has shown.

    Attributes:
        digest: a hash of its bytes, or where there are none what it is called.
        width: in pixels, as it is to be looked at.
        height: in pixels.
        problem: why it cannot be opened; empty where it can.
    """

    digest: str
    width: int = 0
    height: int = 0
    problem: str = ""


class StoredImage(ABC):
    """An image that is not in memory. As a string it is what to call it: its path, or its place in a data set."""

    def __init__(self) -> None:
        self._seen: Seen | None = None

    @abstractmethod
    def read(self) -> bytes:
        """The file's content."""

    @property
    def seen(self) -> Seen:
        """What looking at it shows; looked at when first asked for."""
        if self._seen is None:
            self._seen = _look(self)
        return self._seen

    @property
    def digest(self) -> str:
        """By what equal images are known."""
        return self.seen.digest

    def open(self) -> Image:
        """The image in red, green and blue, as its camera was held."""
        return as_rgb(self.read())


class ImageFile(StoredImage):
    """An image in a file of its own.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """The file's content."""
        return self.path.read_bytes()


class ImageInTable(StoredImage):
    """An image whose bytes lie in a memory-mapped table.

    Args:
        rows: the `datasets.Dataset`, of this one column.
        number: the row's.
        column: the column: bytes, or ``{"bytes": ...}``.
        name: what to call it.
    """

    def __init__(self, rows: Any, number: int, column: str, name: str) -> None:
        super().__init__()
        self.rows, self.number, self.column, self.name = rows, number, column, name

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The file's content."""
        value = self.rows[self.number][self.column]
        content: bytes = value["bytes"] if isinstance(value, dict) else value
        return content


def look_at(images: Iterable[StoredImage]) -> None:
    """Looks at images, several at a time, so that afterwards ``seen`` costs nothing.

    Args:
        images: those that were looked at before cost nothing now.
    """
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:  # reading waits, and decoding frees the lock
        for _ in pool.map(lambda image: image.seen, images):
            pass


def as_rgb(content: bytes) -> Image:
    """An image file's content as an image in red, green and blue, as its camera was held.

    Args:
        content: the file's; grey, with a palette or transparency, or for print; of several frames the first is taken.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 what counts up to 65,535
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@cache
def image_endings() -> frozenset[str]:
    """The endings of the files that Pillow can open."""
    from PIL import Image

    Image.init()
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _look(image: StoredImage) -> Seen:
    from PIL import Image, UnidentifiedImageError

    try:
        content = image.read()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Seen(str(image), problem="there is no such file" if missing else error.strerror or str(error))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            if opened.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
            opened.draft("RGB", (1, 1))  # a JPEG is read to its end, but only an eighth of it decoded
            opened.load()
    except UnidentifiedImageError:
        said = "it is empty" if not content else "its content is none of an image that Pillow knows"
        return Seen(digest, problem=said)
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        return Seen(digest, problem=f"{error}" or type(error).__name__)
    return Seen(digest, width, height)
