"""Sizes in bytes as a person reads them."""

from __future__ import annotations


def size(count: float) -> str:
    """A number of bytes in the unit that keeps it short, with three digits or so.

    Args:
        count: bytes.

    Returns:
        Such as ``"816 B"``, ``"4.2 kB"`` or ``"272.6 MB"``; a kB is 1000 bytes.

    Example:
        >>> size(816), size(4_235 * 4), size(999_960), size(90.9e6)
        ('816 B', '16.9 kB', '1.0 MB', '90.9 MB')
    """
    shown = float(count)
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if shown < (1000 if unit == "B" else 999.95):
            break
        shown, unit = shown / 1000, larger
    return f"{shown:.0f} {unit}" if unit == "B" else f"{shown:.1f} {unit}"
