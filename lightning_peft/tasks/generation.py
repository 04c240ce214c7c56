"""Options of a model's ``generate``, as a configuration or a file holds them."""

from __future__ import annotations

from typing import Any

from lightning_peft.core.problems import nearest


def check_generation(options: dict[str, Any]) -> None:
    """Refuses what is no setting of transformers' ``GenerationConfig``.

    What else ``generate`` takes is no plain value, or fetches code and runs it (``custom_generate`` with
    ``trust_remote_code``), for which options come from checkpoints and adapters' folders too often.

    Args:
        options: of ``generate``.

    Raises:
        ValueError: if one is unknown.
    """
    if not options:
        return
    from transformers import GenerationConfig

    known = [k for k in vars(GenerationConfig()) if not k.startswith("_")]
    unknown = [k for k in options if k not in known]
    if unknown:
        raise ValueError(f"generation has no option {unknown[0]!r}{nearest(str(unknown[0]), known)}")
