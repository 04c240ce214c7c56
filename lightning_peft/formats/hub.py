"""Whether the Hugging Face hub can be asked at all."""

from __future__ import annotations

import socket
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
