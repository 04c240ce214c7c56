"""The Hugging Face hub: whether it can be asked at all, and what is a name there."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlparse


def hub_is_reachable() -> bool:
    """Whether the hub's name can be looked up: without this its clients try again and again for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def hub_name(name: str | None) -> str | None:
    """A name as the hub would have it, or None if it is no such name or there is a local folder or file of it.

    Args:
        name: what stands for a model or a data set.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def origin_of(said: str) -> dict[str, str | None]:
    """Where data is from, without where that lies on somebody's machine.

    Args:
        said: a file, a folder or a name on the hub, and perhaps ``" and 2 more"``.

    Returns:
        ``origin``: the name of the file or folder, or the name on the hub; ``hub_name``: the latter, if it is one.
    """
    first, more = re.fullmatch(r"(.*?)( and \d+ more)?", said, re.DOTALL).groups()  # type: ignore[union-attr]
    # names on the hub have an owner; "imdb" alone could be anything
    name = hub_name(first.partition(":")[0]) if "/" in first and not more else None
    return {"origin": first if name else Path(first).name + (more or ""), "hub_name": name}
