"""What reads the text in a model, and the layers that it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.nn import Embedding, Module, ModuleList

from lightning_peft.core.matching import base_modules, class_of, is_within, match_modules
from lightning_peft.methods.blocks import hidden_size


class Reader(NamedTuple):
    """The part of a model that token ids go into.

    Attributes:
        name: its name below the root.
        module: the module: the whole language model, or the encoder of an encoder-decoder.
        host: the language model.
    """

    name: str
    module: Any
    host: Any


class Layers(NamedTuple):
    """Layers that hidden states go through one after another.

    Attributes:
        names: of the layers, below the root.
        hidden: the width of the hidden states.
    """

    names: list[str]
    hidden: int


def find_reader(method: str, model: Module) -> Reader:
    """The one part of a model that has input embeddings, outermost first.

    Args:
        method: its name, for errors.
        model: the root, or something with exactly one language model in it.

    Raises:
        ValueError: if there is no language model, or several.
    """
    modules = base_modules(model)
    found: list[str] = []
    for name, module in modules.items():
        if "" not in found and not is_within(name, found) and input_embedding(module) is not None:
            found.append(name)
    if len(found) != 1:
        what = f"{found} in {class_of(model).__name__}" if found else f"none in {class_of(model).__name__}"
        raise ValueError(
            f"{method} needs exactly one module with get_input_embeddings() that embeds tokens, but found "
            f"{what}; " + ("name the one to adapt (model=...)" if found else "choose another method for this model")
        )
    host: Any = modules[found[0]]
    reader = host.get_encoder() if getattr(host.config, "is_encoder_decoder", False) else host
    return Reader(next(n for n, m in modules.items() if m is reader), reader, host)


def input_embedding(module: Any) -> Embedding | None:
    """A module's embedding of token ids, or None where it has none."""
    if not hasattr(module, "get_input_embeddings") or not hasattr(module, "config"):
        return None
    try:
        embedding = module.get_input_embeddings()
    except NotImplementedError:  # transformers' vision models inherit the method and cannot answer it
        return None
    return embedding if isinstance(embedding, Embedding) else None


def find_layers(
    method: str,
    model: Module,
    named: Sequence[str] | str | None,
    numbers: int | Sequence[int] | None = None,
    *,
    decoder: bool = False,
) -> Layers:
    """The layers that the text goes through: those that the user names, or a model's stack of them.

    A transformers model says in its configuration how many there are, so the outermost list of that many modules is
    the stack; a model without a configuration has one list of modules.

    Args:
        method: its name, for errors.
        model: the root.
        named: the option ``layer_modules``: patterns for a model whose stack is not found.
        numbers: only the layers of these numbers.
        decoder: which stack of an encoder-decoder: the decoder's, else the encoder's.

    Raises:
        ValueError: if no stack is found, or a pattern or a number matches nothing.
    """
    if named is not None:
        names = match_modules(model, named, layers=numbers, option="layer_modules")
        return Layers(names, hidden_size(method, model, names[0]))
    name, part = _part_with_layers(model, decoder)
    count = _count(part, decoder=decoder)
    inside = {n: m for n, m in base_modules(model).items() if not name or is_within(n, [name])}
    lists = {n: len(m) for n, m in inside.items() if isinstance(m, ModuleList) and len(m)}
    stacks: dict[str, int] = {}
    for place, length in lists.items():
        if count in (None, length) and not is_within(place, stacks):
            stacks[place] = length
    if len(stacks) != 1:
        what = f"several stacks of layers, {list(stacks)}," if stacks else "no stack of layers"
        raise ValueError(
            f"{method} finds {what} in {class_of(model).__name__}; name the layers in layer_modules, for instance "
            r"layer_modules='.*layers\.\d+'"
        )
    names = [f"{stack}.{i}" for stack, length in stacks.items() for i in range(length)]
    if numbers is not None:
        names = match_modules(model, names, layers=numbers, option="layer_modules")
    width = hidden_size(method, model, names[0]) if count is None else int(_text_config(part).hidden_size)
    return Layers(names, width)


def _part_with_layers(model: Module, decoder: bool) -> tuple[str, Any]:
    """The outermost module that says how many layers it has, or its half in an encoder-decoder; else the root."""
    modules = base_modules(model)
    name: str
    part: Any
    name, part = next(((n, m) for n, m in modules.items() if _count(m) is not None), ("", model))
    if not getattr(getattr(part, "config", None), "is_encoder_decoder", False):
        return name, part
    half = part.get_decoder() if decoder else part.get_encoder()
    return next((n, m) for n, m in modules.items() if m is half)


def _count(module: Module, *, decoder: bool = False) -> int | None:
    """How many layers a model says that it has."""
    count = getattr(_text_config(module, decoder=decoder), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _text_config(module: Any, *, decoder: bool = False) -> Any:
    """A model's configuration, or that of the language model in it where it sees or hears too."""
    config: Any = getattr(module, "config", None)
    # told of the decoder it gives its number of layers, which may be another than the encoder's
    return config.get_text_config(decoder=decoder or None) if hasattr(config, "get_text_config") else config
