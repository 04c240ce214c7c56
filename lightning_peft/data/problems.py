"""What is wrong with rows: an error that lists the first of them, or a count where they are to be left out."""

from __future__ import annotations

import warnings

_SHOWN = 5


class RowProblems:
    """Collects what is wrong with single rows.

    Args:
        skip: leave such rows out; otherwise `settle` raises.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self.first: list[str] = []
        self.places: set[str] = set()

    def add(self, place: str, problem: str) -> None:
        """Takes note of a row.

        Args:
            place: where it stands.
            problem: what is wrong, as it goes on behind the place.
        """
        self.count += 1
        self.places.add(place)
        if len(self.first) < _SHOWN:
            self.first.append(f"{place}{problem}")

    def settle(self, what: str, rows: int) -> None:
        """Says what was found, once all rows were seen.

        Args:
            what: the split and where it comes from.
            rows: how many rows there are besides.

        Raises:
            ValueError: if rows are wrong and are not to be left out, or none is left.
        """
        if self.count == 0:
            return
        if self.count == 1:
            said = f"{what}: {self.first[0]}"
        else:
            more = [f"and {self.count - len(self.first)} more"] if self.count > len(self.first) else []
            lines = [f"{what}: {self.count} of {self.count + rows} rows cannot be used", *self.first, *more]
            said = "\n  ".join(lines)
        gap = " " if self.count == 1 else "\n"
        if not self.skip:
            raise ValueError(f"{said}{gap}(data.on_error=skip leaves such rows out)")
        if rows == 0:
            raise ValueError(f"{said}{gap}(no row is left)")
        warnings.warn(f"{said}{gap}(left out)", stacklevel=2)
        self.count, self.first, self.places = 0, [], set()
