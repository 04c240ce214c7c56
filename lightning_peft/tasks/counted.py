"""What a language model says about the tokens that count: no padding is run, and no logits of the others are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.base import is_frozen_linear
from lightning_peft.core.imitation import has_no_numbers
from lightning_peft.core.per_forward import this_forward
from lightning_peft.core.probing import probing, states_of
from lightning_peft.tasks.packing import packed_rows, takes_other_rows
from lightning_peft.tasks.padding import IGNORED

Way = Literal["hidden", "logits", "all"]

_SAID: dict[Way, str] = {
    "hidden": "The loss is taken in chunks from what the head reads of the tokens that count",
    "logits": "The loss is taken from the logits of the tokens that count",
    "all": "The loss is taken from the logits of all tokens",
}
_CHUNK = 2**24  # logits that exist at a time while a model is trained, 64 MiB of them in float32
_PROBED = (2, 8)  # rows and tokens on which the ways are compared
_ways: WeakKeyDictionary[Module, dict[tuple[Any, ...], Way]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LogitsAt:
    """Logits of the tokens that count.

    Attributes:
        logits: ``(counted, vocabulary)``.
        labels: ``(counted,)``.
    """

    logits: Tensor
    labels: Tensor

    def losses(self) -> Tensor:
        """Each token's cross-entropy, ``(counted,)``."""
        return F.cross_entropy(_wide(self.logits), self.labels, reduction="none")

    def total(self) -> Tensor:
        """The sum of the tokens' cross-entropies."""
        return F.cross_entropy(_wide(self.logits), self.labels, reduction="sum")


@dataclass(frozen=True)
class HiddenAt:
    """What the head reads of the tokens that count: the loss is taken in chunks, and logits are made on demand.

    Attributes:
        hidden: ``(counted, hidden)``.
        labels: ``(counted,)``.
        weight: of the head, ``(vocabulary, hidden)``.
        bias: of the head, ``(vocabulary,)``, or None.
    """

    hidden: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """``(counted, vocabulary)``."""
        return F.linear(self.hidden, self.weight, self.bias)

    def losses(self) -> Tensor:
        """Each token's cross-entropy, ``(counted,)``; logits are made again in the backward pass, a chunk at a time."""
        if not len(self.labels):
            return self.hidden.sum(1)

        def of_some(hidden: Tensor, labels: Tensor) -> Tensor:
            return LogitsAt(F.linear(hidden, self.weight, self.bias), labels).losses()

        parts = zip(torch.split(self.hidden, self._rows), torch.split(self.labels, self._rows), strict=True)
        return torch.cat([checkpoint(of_some, *part, use_reentrant=False) for part in parts])

    def total(self) -> Tensor:
        """The sum of the tokens' cross-entropies."""
        kind = self.hidden.device.type
        # the fused loss would be rounded to 16 bits, and with it what is logged
        if torch.is_autocast_enabled(kind) or self.hidden.dtype.itemsize < 4 or not len(self.labels):
            return self.losses().sum()
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(len(self.labels), self._rows))
        return F.linear_cross_entropy(
            self.hidden, self.weight, self.labels, linear_bias=self.bias, reduction="sum", options=options
        )

    @property
    def _rows(self) -> int:
        return max(1, _CHUNK // len(self.weight))


Counted = LogitsAt | HiddenAt


def counted(model: Any, batch: dict[str, Tensor], *, all_logits: bool = False, packing: bool = True) -> Counted:
    """Runs a causal language model without padding, and its head on the tokens that count alone.

    Rows are packed where the model keeps those in one bin apart. A head that is a plain frozen Linear is left out and
    its weight read; any other head is called with those tokens only. What of this gives the model's own logits is
    tried on a few tokens before the first batch, with other values in the adapter: at its start it may do nothing.

    Args:
        model: a Hugging Face model with a language model's head.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, which are -100 where a token does not count, all
            ``(batch, tokens)``.
        all_logits: computes those of all tokens, as the model does by itself.
        packing: whether rows may be packed.

    Returns:
        What it says there.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    way = "all" if all_logits else _way(model, inputs)
    packed = packed_rows(model, inputs) if packing else None
    tokens, ahead = batch["labels"].shape[1], batch["labels"][:, 1:]
    where = ahead != IGNORED
    labels = ahead[where]

    def at_labels(states: Tensor) -> Tensor:
        there = where.to(states.device)  # of a model over several devices
        # virtual tokens stand before the text
        return states[:, -tokens:][:, :-1][there] if packed is None else packed.at(states, there)

    def run() -> Any:
        return model(**inputs) if packed is None else packed.run(model)

    if way == "all":
        logits = at_labels(run().logits)
        return LogitsAt(logits, labels.to(logits.device))
    head, read = model.get_output_embeddings(), list[Tensor]()

    def replaced(hidden: Tensor) -> Tensor:
        read.append(at_labels(hidden))
        return hidden[:, :0] if way == "hidden" else read[0].unsqueeze(0)

    with _before(head, replaced):
        outputs = run()
    if way == "logits":
        return LogitsAt(outputs.logits.squeeze(0), labels.to(outputs.logits.device))
    return HiddenAt(read[0], labels.to(read[0].device), head.weight, head.bias)


@contextmanager
def _before(head: Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes what the head is given in this forward."""
    mine = this_forward()

    def changed(_: Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (change(args[0]), *args[1:]) if args and mine() else None

    handle = head.register_forward_pre_hook(changed)
    try:
        yield
    finally:
        handle.remove()


def _way(model: Any, inputs: dict[str, Tensor]) -> Way:
    """How the head is run."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not takes_other_rows(model):
        return "all"
    key = (type(head), is_frozen_linear(head), states_of(model))
    ways = _ways.setdefault(model, {})
    if key not in ways:
        few = _few(model, inputs)
        if has_no_numbers(head.weight):
            ways[key] = _seen(model, head, few)
        else:
            with probing(model):
                ways[key] = _tried(model, head, few)
            rank_zero_info(_SAID[ways[key]])
    return ways[key]


def _few(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of different tokens: of padding, with which a batch may begin, any head may give zeros, changed or not."""
    ids = torch.arange(_PROBED[0] * _PROBED[1], device=inputs["input_ids"].device).view(_PROBED)
    return {
        "input_ids": ids % len(model.get_input_embeddings().weight),
        "attention_mask": torch.ones_like(ids, dtype=inputs["attention_mask"].dtype),
    }


@torch.no_grad()
def _seen(model: Any, head: Module, few: dict[str, Tensor]) -> Way:
    """The way of a model without numbers: logits that are just what the head gives have nothing behind it."""
    given = list[Tensor]()
    handle = head.register_forward_hook(lambda _, args, output: given.extend((args[0], output)))
    try:
        own = model(**few).logits
    finally:
        handle.remove()
    if len(given) != 2:
        return "all"
    if given[1].untyped_storage()._cdata == own.untyped_storage()._cdata and _readable(head, given[0]):
        return "hidden"
    return "logits" if given[0].shape[1] == own.shape[1] else "all"


def _tried(model: Any, head: Module, few: dict[str, Tensor]) -> Way:
    """The first way that gives the model's own logits on a few tokens."""
    read = list[Tensor]()

    def noted(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden

    def flat(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).unsqueeze(0)

    with _before(head, noted):
        own = model(**few).logits
    if len(read) != 1 or read[0].dim() != 3:
        return "all"
    # the same product of the same numbers: what is not equal to the bit has something behind the head
    if _readable(head, read[0]):
        made = F.linear(read[0], head.weight, head.bias)[:, -own.shape[1] :]  # type: ignore[arg-type]
        if torch.equal(made, own):
            return "hidden"
    if read[0].shape[1] != own.shape[1]:
        return "all"
    with _before(head, flat):
        some = model(**few).logits
    return "logits" if torch.equal(some, flat(own)) else "all"


def _readable(head: Module, hidden: Tensor) -> bool:
    return is_frozen_linear(head) and head.weight.device == hidden.device


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
