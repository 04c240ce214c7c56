"""The largest batch whose step fits into a memory, from a few counted steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

MOST = 4096
"""Rows, beyond which nobody asks."""


def largest_batches(peak: Callable[[int], int], memories: Iterable[int], first: int = 2) -> list[int]:
    """How many rows fit into each memory.

    A step's peak is the highest of sums that grow evenly with the rows, so between two sizes that were counted it lies
    on or below the line between them: what is given fits. A row more may fit too, or several where another sum is the
    highest at one of the two.

    Args:
        peak: counts a step of so many rows, in bytes.
        memories: bytes that a step may take.
        first: rows of a step that is counted anyway.

    Returns:
        For each memory the number of rows, 0 where not even one fits and 4096 where at least so many do.
    """
    memories = list(memories)
    known = {1: peak(1)}
    most = max(memories, default=0)
    if known[1] <= most:
        second = max(2, min(first, MOST))
        known[second] = peak(second)
    while known[max(known)] <= most and max(known) < MOST:
        rows = max(known)
        before = max(r for r in known if r < rows)
        slope = max((known[rows] - known[before]) / (rows - before), 1)
        # as far as the most memory reaches, or a little further, to be between two sizes that are known
        rows = min(MOST, max(rows + 1, int(rows + 1.05 * (most - known[rows]) / slope) + 1))
        known[rows] = peak(rows)
    return [_rows(known, memory) for memory in memories]


def _rows(known: dict[int, int], memory: int) -> int:
    fit = [rows for rows in known if known[rows] <= memory]
    if not fit:
        return 0
    rows = max(fit)
    above = min((r for r in known if r > rows), default=None)
    if above is None:
        return rows
    slope = (known[above] - known[rows]) / (above - rows)
    return min(above - 1, rows + int((memory - known[rows]) / slope))
