"""What a model makes of rows that it is not trained on: its layers' hidden states, and the loss of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from lightning_peft.core.mode import evaluating
from lightning_peft.core.per_forward import labels_of_batch, this_forward
from lightning_peft.methods.reader import find_layers


@dataclass(frozen=True)
class Reading:
    """What was seen of all rows.

    Attributes:
        loss: mean cross-entropy of the next token, in nats; None where the model writes nothing.
        states: each layer's output by its name, ``(positions, width)`` in float32 on the CPU: padding and virtual
            tokens are left out.
    """

    loss: float | None
    states: dict[str, Tensor]


def stacks_of(model: Any, named: list[str] | str | None = None) -> dict[str, Module]:
    """The layers whose output is read; in an encoder-decoder those of both.

    Args:
        model: a Hugging Face model.
        named: the option ``layer_modules``, for a model whose stack is not found.

    Raises:
        ValueError: if no stack is found, or a pattern matches nothing.
    """
    halves = (False, True) if named is None and model.config.is_encoder_decoder else (False,)
    names = [n for half in halves for n in find_layers("Forgetting", model, named, decoder=half).names]
    return {n: model.get_submodule(n) for n in names}


def writes(model: Any) -> bool:
    """Whether a model's loss is that of the next token.

    Args:
        model: a Hugging Face model.
    """
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


@torch.no_grad()
def read_rows(model: Any, layers: Mapping[str, Module], batches: Iterable[dict[str, Tensor]]) -> Reading:
    """Runs a model on rows, in evaluation mode.

    Args:
        model: a Hugging Face model, adapted or not.
        layers: by name, as `stacks_of` gives them.
        batches: what it is called with. Rows of text are padded on the right, and begin at the same place for all that
            reads them.

    Raises:
        ValueError: if a layer did not run, or gives something else than hidden states.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    total, count, loss = 0.0, 0, writes(model)
    with evaluating(model), labels_of_batch.passing(None):
        for batch in batches:
            mask = batch.get("attention_mask")
            with _noting(layers) as seen:
                output = model(**batch)
            for name in layers:
                found[name].append(_at_text(name, seen.get(name), mask).float().cpu())
            if loss:
                losses = _losses(output.logits, batch)
                total, count = total + float(losses.double().sum()), count + len(losses)
    return Reading(total / max(count, 1) if loss else None, {name: torch.cat(parts) for name, parts in found.items()})


@contextmanager
def _noting(layers: Mapping[str, Module]) -> Iterator[dict[str, Any]]:
    """What each layer gives in this forward, its hidden state first where that is a tuple."""
    seen: dict[str, Any] = {}
    mine = this_forward()
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def note(_: Module, __: Any, output: Any, name: str = name) -> None:
                if mine():
                    seen[name] = output[0] if isinstance(output, tuple) else output

            hooks.callback(layer.register_forward_hook(note).remove)
        yield seen


def _at_text(name: str, state: Any, mask: Tensor | None) -> Tensor:
    """A layer's output where the text or the image is, ``(positions, width)``."""
    if not isinstance(state, Tensor) or state.dim() not in (3, 4):
        got = f"a tensor of {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"Forgetting: the layer {name!r} gives {got}, expected (batch, tokens, hidden) or (batch, channels, "
            "height, width); name other layers in layer_modules"
        )
    if state.dim() == 4:
        return state.movedim(1, -1).flatten(0, 2)
    if mask is None:
        return state.flatten(0, 1)
    # rows are padded on the right, so virtual tokens stand before all texts
    return state[:, -mask.shape[1] :][mask.bool().to(state.device)]


def _losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of each token that stands behind another, ``(tokens,)``."""
    ids, mask = batch["input_ids"].to(logits.device), batch["attention_mask"].to(logits.device)
    said = logits[:, -ids.shape[1] :][:, :-1]
    where = mask[:, 1:].bool()
    return F.cross_entropy(said[where].float(), ids[:, 1:][where], reduction="none")
