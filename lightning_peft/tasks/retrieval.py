"""How well anchors find their positives among all of a data set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_CUTS = (1, 5, 10)
_CHUNK = 1024  # anchors that are compared with everything at once


class Retrieval(Metric):
    """``recall_at_1``, ``recall_at_5``, ``recall_at_10`` and ``mrr``, the mean of 1 over the positive's place.

    An anchor's place is counted among the positives of the whole data set; a pair that comes twice, as where each
    device evaluates all rows, is one. Texts equal to its own positive, and other positives of an equal anchor, are
    right answers too and do not push it down; wrong answers that are as near do, or a model that gives all texts one
    vector would find everything.
    """

    full_state_update: bool = False
    anchors: list[Tensor]
    positives: list[Tensor]
    keys: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("anchors", "positives", "keys"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, anchors: Tensor, positives: Tensor, keys: Tensor) -> None:
        """Adds pairs.

        Args:
            anchors: vectors of length 1, ``(rows, hidden)``.
            positives: the same of what each is to find.
            keys: equal for equal texts, ``(rows, 2)``.
        """
        self.anchors.append(anchors)
        self.positives.append(positives)
        self.keys.append(keys)

    def compute(self) -> dict[str, Tensor]:
        """The shares and the mean over all anchors, from 0 to 1."""
        anchors, positives, keys = (dim_zero_cat(state) for state in (self.anchors, self.positives, self.keys))
        distinct, own = keys.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
        numbers = torch.arange(len(keys), device=keys.device)
        first = numbers.new_full((len(distinct),), len(keys)).scatter_reduce(0, own, numbers, "amin")
        parts = zip(*(torch.split(part, _CHUNK) for part in (anchors, keys, own)), strict=True)
        places = torch.cat([_places(a, k, o, positives[first], keys[first]) for a, k, o in parts])
        found = {f"recall_at_{k}": (places <= k).float().mean() for k in _CUTS}
        return {**found, "mrr": places.float().reciprocal().mean()}


def _places(anchors: Tensor, keys: Tensor, own: Tensor, among: Tensor, their_keys: Tensor) -> Tensor:
    """The place of each of some anchors' own positives, from 1 on, among those of all pairs that differ."""
    cosines = anchors @ among.T
    right = (keys.unsqueeze(1) == their_keys.unsqueeze(0)).any(-1)
    before = (cosines >= cosines.gather(1, own.unsqueeze(1))) & ~right
    return before.sum(1) + 1


def key_of(ids: Iterable[int]) -> int:
    """A number that is equal for equal token ids, in every process.

    Args:
        ids: token ids; none at all have a number too.
    """
    return hash(tuple(int(i) for i in ids))
