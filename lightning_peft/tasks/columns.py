"""The columns that a task takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """One shape that a task's rows may have.

    Attributes:
        inputs: columns that suffice to predict.
        targets: what is learnt, besides.
        optional: inputs that may be there.
        optional_targets: what may be learnt, where it is there.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    optional_targets: tuple[str, ...] = ()

    def required(self, *, training: bool) -> tuple[str, ...]:
        """The columns that must be there.

        Args:
            training: whether what is learnt is needed too.
        """
        return (*self.inputs, *self.targets) if training else self.inputs

    def all(self) -> tuple[str, ...]:
        """Every column of the shape."""
        return (*self.inputs, *self.optional, *self.targets, *self.optional_targets)
