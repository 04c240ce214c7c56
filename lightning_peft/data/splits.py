"""Rows in two parts, and a share of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from lightning_peft.data.files import Example


def split_off(
    examples: Sequence[Example], share: float, inputs: Sequence[str], seed: int
) -> tuple[list[Example], list[Example]]:
    """Parts rows into those to train on and those to validate with; equal inputs stay on one side.

    Args:
        examples: the rows.
        share: of them that validates.
        inputs: the columns by which rows are equal.
        seed: fixes which.

    Returns:
        Both parts; the first keeps the order.

    Raises:
        ValueError: if one of them would be empty.
    """
    keys = [inputs_key(example, inputs) for example in examples]
    groups: dict[str, list[Example]] = {}
    for key, example in zip(keys, examples, strict=True):
        groups.setdefault(key, []).append(example)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    validation: list[Example] = []
    while len(order) > 1 and len(validation) < share * len(examples):
        validation += groups.pop(order.pop())
    train = [example for key, example in zip(keys, examples, strict=True) if key in groups]
    if not train or not validation:
        columns = " and ".join(repr(c) for c in inputs if any(c in (e.row or {}) for e in examples))
        what = "1 row is" if len(examples) == 1 else f"{len(examples)} rows that all have the same {columns} are"
        raise ValueError(
            f"{what} too few to split into training and validation: rows with equal inputs stay on one side; give "
            "other rows, or validation_files"
        )
    return train, validation


def inputs_key(example: Example, inputs: Sequence[str]) -> str:
    """What two rows have in common that a model cannot tell apart.

    Args:
        example: the row.
        inputs: the columns that the model sees.
    """
    row = example.row or {}
    seen = [row.get(c) for c in inputs]
    # the input of some shapes lies within their targets
    return json.dumps(row if all(value is None for value in seen) else seen, sort_keys=True, default=_identity)


def _identity(value: Any) -> str:
    """An image is known again by its bytes, whatever file they lie in."""
    return str(getattr(value, "digest", value))


def some_of(examples: Sequence[Example], limit: float | None, seed: int) -> list[Example]:
    """So many rows, or such a share of them, at random.

    Args:
        examples: the rows.
        limit: a number of rows, or a share below 1; None takes all in their order.
        seed: fixes which.
    """
    if limit is None:
        return list(examples)
    wanted = max(1, round(limit * len(examples))) if limit < 1 else int(limit)
    return random.Random(seed).sample(list(examples), min(wanted, len(examples)))
