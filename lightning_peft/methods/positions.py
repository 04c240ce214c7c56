"""Chosen positions of each row: its first and last tokens, padding left out, found once a forward of the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.per_forward import PerForward, labels_of_batch
from lightning_peft.core.problems import an


class Ends(NamedTuple):
    """How many tokens at either end of a text.

    Attributes:
        first: from its beginning.
        last: up to its end.
    """

    first: int
    last: int


def parse_positions(positions: str) -> Ends | None:
    """``"f3+l2"`` as numbers.

    Args:
        positions: ``"f3+l2"``, ``"f3"``, ``"l2"``, or ``"all"``.

    Returns:
        The numbers, or None for ``"all"``.

    Raises:
        ValueError: if it is none of these.
    """
    if positions == "all":
        return None
    found = re.fullmatch(r"(?:f(\d+))?(?:(?:^|\+)l(\d+))?", positions)
    ends = Ends(int(found.group(1) or 0), int(found.group(2) or 0)) if found else Ends(0, 0)
    if not any(ends):
        raise ValueError(f"positions must be such as 'f3+l2', 'f3', 'l2' or 'all', but got {positions!r}")
    return ends


class Chosen(NamedTuple):
    """The positions of one forward, for each group of them that has weights of its own.

    Attributes:
        places: ``(batch, groups, k)``; k is 0 where nothing is chosen in this forward.
        valid: which of them count, of the same shape; a short text has fewer than k.
        tokens: the length of the rows.
    """

    places: Tensor
    valid: Tensor
    tokens: int


def choose(prompt: Tensor, ends: Ends, *, shared: bool) -> Chosen:
    """The first and last tokens of each row; a row with fewer is halved between the two.

    Args:
        prompt: which tokens count, ``(batch, tokens)``, boolean.
        ends: how many.
        shared: one group for both ends, or one each.
    """
    order = torch.argsort((~prompt).long(), dim=1, stable=True)  # the tokens that count, then the others
    n = prompt.sum(1, keepdim=True)
    short = n < sum(ends)
    first = torch.where(short, (n // 2).clamp_max(ends.first), ends.first)
    last = torch.where(short, (n - n // 2).clamp_max(ends.last), ends.last)
    ordered, valid = [], []
    for count, most, start in ((first, ends.first, torch.zeros_like(n)), (last, ends.last, n - last)):
        step = torch.arange(most, device=n.device)
        ordered.append(order.gather(1, (start + step).clamp(0, order.shape[1] - 1)))
        valid.append((step < count) & (step < n))
    if shared or 0 in ends:
        places, counts = torch.cat(ordered, 1).unsqueeze(1), torch.cat(valid, 1).unsqueeze(1)
    else:
        width = max(ends)
        places, counts = (
            torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts], 1)
            for parts in (ordered, valid)
        )
    return Chosen(places, counts, prompt.shape[1])


class FindPositions(AdapterLayer):
    """Stands on the model that reads the text, and passes the chosen positions on for the length of a forward.

    Positions are the prompt's. While a model learns to write, the prompt ends before the first token with a label; a
    row without such a prompt is taken whole. Once there is a cache the prompt has been read, and nothing is chosen.

    Args:
        method: its name, for errors.
        reader: the model.
        ends: how many tokens at either end.
        shared: one group for both ends, or one each.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, method: str, reader: Any, ends: Ends, *, shared: bool) -> None:
        super().__init__()
        self.method = method
        self.ends = ends
        self.shared = shared
        self.chosen: PerForward[Chosen] = PerForward()
        self.names = list(inspect.signature(reader.forward).parameters)
        head = reader.get_output_embeddings() if hasattr(reader, "get_output_embeddings") else None
        self.writes = head is not None and "past_key_values" in self.names

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model with the positions at hand."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        source = values.get("input_ids")
        source = values.get("inputs_embeds") if source is None else source
        if source is None:
            raise ValueError(f"{self.method} chooses positions of token ids or embeddings; pass input_ids")
        with self.chosen.passing(self._choose(source, values)), labels_of_batch.passing(None):
            return base(*args, **kwargs)

    def _choose(self, source: Tensor, values: dict[str, Any]) -> Chosen:
        batch, tokens = source.shape[:2]
        cache = values.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            empty = torch.empty(batch, 1, 0, dtype=torch.long, device=source.device)
            return Chosen(empty, empty.bool(), tokens)
        mask = values.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=source.device)
        if not isinstance(mask, Tensor) or mask.shape != (batch, tokens):
            what = f"a {tuple(mask.shape)} tensor" if isinstance(mask, Tensor) else an(type(mask).__name__)
            raise ValueError(
                f"{self.method} reads the ends of each row off an attention_mask of (batch, tokens) = "
                f"({batch}, {tokens}), but got {what}; static caches and packed batches make such masks: use a "
                "dynamic cache and plain padding, or positions='all'"
            )
        return choose(self._prompt(mask.bool(), values.get("labels")), self.ends, shared=self.shared)

    def _prompt(self, text: Tensor, labels: Any) -> Tensor:
        labels = labels_of_batch.read() if labels is None else labels
        if (
            not self.writes
            or not isinstance(labels, Tensor)
            or labels.shape != text.shape
            or labels.is_floating_point()
        ):
            return text
        before = text & (((labels != -100) & text).cumsum(1) == 0)
        return torch.where(before.any(1, keepdim=True), before, text)
