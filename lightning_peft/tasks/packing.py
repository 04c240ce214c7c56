"""Rows of a batch put one behind the other, without padding, where a model keeps them apart."""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.adapters import routing_of
from lightning_peft.core.imitation import has_no_numbers
from lightning_peft.core.probing import agree, probing, rounding, states_of
from lightning_peft.tasks.row_attention import has_rows, leave_rows, take_rows, text_config, without_masks

Apart = Literal["no", "by mask", "by row"]
"""How rows in one bin are kept apart: not at all, by the model's masks, or by attention that takes each by itself."""

_apart: WeakKeyDictionary[Module, dict[tuple[Any, ...], Apart]] = WeakKeyDictionary()


class Packed(NamedTuple):
    """A batch with several rows in one.

    Attributes:
        inputs: ``input_ids`` and ``position_ids``, ``(bins, width)``; positions begin again with every row, by which
            transformers' attention masks tell rows apart. What fills a bin up is a row of one token each. In one bin
            of all rows ``rows`` may say how long each is.
        places: where each token of the batch has gone, among all tokens of the bins: ``(batch, tokens)``.
    """

    inputs: dict[str, Any]
    places: Tensor

    def run(self, model: Any) -> Any:
        """The model's outputs for the bins."""
        if "rows" not in self.inputs:
            return model(**self.inputs)
        with without_masks(sum(self.inputs["rows"])):
            return model(**self.inputs)

    def at(self, states: Tensor, where: Tensor) -> Tensor:
        """States of chosen tokens in the batch's order.

        Args:
            states: of the bins, ``(bins, width, ...)``.
            where: which of the batch's tokens, ``(batch, tokens)``, without its last ones.

        Returns:
            ``(chosen, ...)``.
        """
        return states.flatten(0, 1)[self.places.to(states.device)[:, : where.shape[1]][where]]


def packs(model: Any) -> bool:
    """Whether a model, with the adapters that are active, gives rows in one bin the logits that they get alone.

    It is tried on three short rows, with other values in the adapters.

    Args:
        model: a Hugging Face model with a language model's head.
    """
    return _how_apart(model) != "no"


def packed_rows(model: Any, inputs: dict[str, Tensor]) -> Packed | None:
    """Packs a batch as the model keeps its rows apart.

    Args:
        model: a Hugging Face model with a language model's head.
        inputs: ``input_ids`` and ``attention_mask``, ``(batch, tokens)``.

    Returns:
        The packed batch; None where the model does not keep them apart, or it would save nothing.
    """
    apart = _how_apart(model)
    return None if apart == "no" else pack(model, inputs, by_row=apart == "by row")


def _how_apart(model: Any) -> Apart:
    if not takes_other_rows(model) or _reads_places(model) or has_no_numbers(model.get_input_embeddings().weight):
        return "no"
    adapters, known = states_of(model), _apart.setdefault(model, {})
    if known.get(adapters) == "by row" and not has_rows(model):  # it got its attention back since
        del known[adapters]
    if adapters not in known:
        known[adapters] = _tried(model)
        rank_zero_info(f"The rows of a batch are {'padded' if known[adapters] == 'no' else 'packed'}")
    return known[adapters]


def _tried(model: Any) -> Apart:
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        return "no"
    named = any(p.kind == p.VAR_KEYWORD for p in taken.values())
    # a block that was compiled by itself would be compiled anew for all lengths of rows
    if named and all(m._compiled_call_impl is None for m in model.modules()) and take_rows(model):
        if _attends_by_row(model):
            return "by row"
        if "by row" not in _apart[model].values():
            leave_rows(model)
    return "by mask" if _keeps_apart(model, by_row=False) else "no"


def _attends_by_row(model: Any) -> bool:
    try:
        return _keeps_apart(model, by_row=True)
    except Exception:  # rows reach modules that do not know of them; what fails without them as well fails next
        return False


def takes_other_rows(model: Any) -> bool:
    """Whether a model may be called with other rows than a batch has.

    Not where each example has an adapter of its own, nor where a graph was compiled: it takes no hook that comes and
    goes, and lengths that always change make it anew.

    Args:
        model: a Hugging Face model.
    """
    routing = routing_of(model)
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    return not compiled and (routing is None or routing.rows is None)


def _reads_places(model: Any) -> bool:
    """Whether what a token sees may hang on its place in the bin, further on than three short rows would show."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(getattr(config, "attention_chunk_size", None)) or not kinds <= {"full_attention", "sliding_attention"}


def _centred(logits: Tensor) -> Tensor:
    """Logits without what all of a token's share, which softmax does not see and in which a difference would hide."""
    return logits.double() - logits.double().mean(-1, keepdim=True)


def _keeps_apart(model: Any, *, by_row: bool) -> bool:
    # in 16 bits an adapter that does much would round a leak of the base away
    with probing(model, size=0.0):
        if _leaks(model, by_row):
            return False
    with probing(model):
        if _leaks(model, by_row):
            return False
        batch = _three_rows(model)
        together, valid = pack(model, batch, by_row=by_row), batch["attention_mask"].bool()
        assert together is not None
        alone = model(**batch).logits
        packed = together.run(model).logits
        return alone.shape[:2] == valid.shape and _agree(together.at(packed, valid), alone[valid])


def _leaks(model: Any, by_row: bool) -> bool:
    """Whether what is said of a row changes with the rows before it in its bin."""
    found = []
    for first in (0, 1):
        batch = _three_rows(model, first)
        together = pack(model, batch, by_row=by_row)
        assert together is not None
        logits = together.run(model).logits
        if logits.shape[:2] != together.inputs["input_ids"].shape:
            return True
        last = batch["attention_mask"].bool() & (torch.arange(3)[:, None] == 2).to(logits.device)
        found.append(together.at(logits, last))
    return not _agree(found[0], found[1], exact=1e-5)


def _agree(found: Tensor, own: Tensor, exact: float | None = None) -> bool:
    return agree(_centred(found), _centred(own), exact or rounding(found.dtype))


def _three_rows(model: Any, first: int = 0) -> dict[str, Tensor]:
    """A batch of which the second row and the third fit into a bin as wide as the first.

    Args:
        model: the model.
        first: the first token of the first two; that of the third stays.
    """
    embedding = model.get_input_embeddings()
    ids = torch.arange(24).view(3, 8)
    ids[:2] += first
    mask = torch.arange(8) < torch.tensor([[8], [5], [3]])
    device = embedding.weight.device
    return {"input_ids": (ids % len(embedding.weight)).to(device), "attention_mask": mask.long().to(device)}


def pack(model: Any, inputs: dict[str, Tensor], *, by_row: bool = False) -> Packed | None:
    """Puts the rows of a batch into bins of one width.

    As many as cost least: few bins have little padding, but in wide ones attention looks at more. Flash attention skips
    what it does not look at, and takes one bin of all rows; so does attention that takes each row by itself.

    Args:
        model: a Hugging Face model that takes packed rows.
        inputs: ``input_ids`` and an ``attention_mask`` with the padding behind each row: ``(batch, tokens)``.
        by_row: whether the model's attention is told where rows are.

    Returns:
        The packed batch; None where that would save nothing, or padding is elsewhere.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or len(ids) < 2:
        return None
    behind = (mask.diff(dim=1) > 0).any()
    *lengths, elsewhere = torch.cat([mask.sum(1), behind.unsqueeze(0)]).tolist()  # one wait for the device
    if elsewhere or min(lengths) < 1:
        return None
    flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
    hidden = model.get_input_embeddings().weight.shape[-1]
    widest = getattr(text_config(model), "max_position_embeddings", None) or sum(lengths)
    starts, bins, width = _fill(lengths, 1) if flash or by_row else _cheapest(lengths, hidden, widest)
    if bins == len(lengths) or (by_row and width == ids.numel()):
        return None
    offsets = torch.arange(ids.shape[1])
    places = torch.tensor(starts)[:, None] + offsets
    valid = offsets < torch.tensor(lengths)[:, None]
    source, target = valid.flatten().nonzero()[:, 0].to(ids.device), places[valid].to(ids.device)
    packed = ids.new_zeros(bins * width).index_copy(0, target, ids.flatten()[source])
    positions = ids.new_zeros(bins * width).index_copy(0, target, source % ids.shape[1])
    found: dict[str, Any] = {"input_ids": packed.view(bins, width), "position_ids": positions.view(bins, width)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        found["use_cache"] = False  # with a cache transformers takes positions for those behind it
    if by_row:
        found["rows"] = tuple(sorted(lengths, reverse=True))
    return Packed(found, places.clamp_(max=bins * width - 1).to(ids.device))


class Bins(NamedTuple):
    """Where rows go: the place at which each begins, among those of all bins; how many bins, and how wide."""

    starts: list[int]
    number: int
    width: int


def _cheapest(lengths: Sequence[int], hidden: int, widest: int) -> Bins:
    """The bins that cost least, where attention in one 4 x ``hidden`` wide costs as much as all else.

    That width was measured: two cores, float32, training a Llama with LoRA, of a hidden size of 256 and of 512. None is
    wider than the model has positions: some keep a mask of that size.
    """
    longest, found = max(lengths), []
    for number in range(math.ceil(sum(lengths) / max(widest, longest)), len(lengths) + 1):
        found.append(_fill(lengths, number))
        if found[-1].width == longest:  # with more bins there is only more padding
            break
    fit = [bins for bins in found if bins.width <= max(widest, longest)]
    return min(fit, key=lambda bins: bins.number * bins.width * (4 * hidden + bins.width))


def _fill(lengths: Sequence[int], number: int) -> Bins:
    """Rows in so many bins, the longest first, each into the emptiest (Graham, 1969)."""
    filled = [(0, bin_) for bin_ in range(number)]
    starts = [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place, bin_ = starts[row] = filled[0]
        heapq.heapreplace(filled, (place + lengths[row], bin_))
    width = max(filled)[0]
    return Bins([bin_ * width + place for place, bin_ in starts], number, width)
