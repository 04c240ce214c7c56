"""How many bytes a training step may take on the device that it is to run on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from lightning_peft.analysis.gpus import RESERVE

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def memory_for_a_step(device: torch.device) -> int | None:
    """What a step may take at most: a GPU's memory less the reserve, or what is free if that is less; or the machine's.

    Args:
        device: a GPU, or the CPU.

    Returns:
        Bytes; None where the system does not say.
    """
    if device.type != "cuda":
        return machine_memory()
    free, total = torch.cuda.mem_get_info(device)
    # what torch keeps for later tensors is this process's own
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free, total - RESERVE)


def machine_memory(own: Path = OWN_GROUPS, groups: Path = GROUPS) -> int | None:
    """The memory that this process may have: the machine's, or less where its control group is limited.

    Args:
        own: the file that names the process's control groups.
        groups: the folder in which their limits lie.

    Returns:
        Bytes; None where the system does not say.
    """
    found = _limits(own, groups)
    with suppress(AttributeError, ValueError, OSError):  # no Unix
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _limits(own: Path, groups: Path) -> list[int]:
    """The limits of the process's control groups and of those that hold them, of both versions of Linux's."""
    found: list[int] = []
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if kinds else (groups, "memory.max")
        place = root / path.lstrip("/")
        # in a container the path may be the host's, of which only the root is seen
        for folder in (place, *place.parents[: len(place.relative_to(root).parts)]):
            with suppress(OSError, ValueError):  # "max" is no limit
                found.append(int((folder / name).read_text(encoding="utf-8")))
    return found
