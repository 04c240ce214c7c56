"""From patterns to modules: exact names, dotted suffixes, regular expressions, ``"all-linear"``, layer numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from torch.nn import Linear, Module, MultiheadAttention

from lightning_peft.core.adapted import site_of
from lightning_peft.core.adapters import Adapters
from lightning_peft.core.problems import an, and_more, nearest

ALL_LINEAR = "all-linear"
_SHOWN = 8  # patterns that match nothing, of which an error tells


def class_of(module: Module) -> type[Module]:
    """The module's class before adaptation."""
    site = site_of(module)
    return type(module) if site is None else site.base.cls


def is_conv1d(module: Module) -> bool:
    """Whether it is transformers' ``Conv1D``: a Linear with its weight stored as ``(in, out)``."""
    return any(c.__name__ == "Conv1D" and hasattr(module, "nf") for c in type(module).__mro__)


def reads_directly(parent: Module, child: str) -> bool:
    """Whether a module takes the weights of a child and never, or not on every path, calls it.

    These are ``nn.MultiheadAttention`` with its output projection, and the mixers of state-space models (told by
    their parameters ``A_log`` and ``D``), whose fused training path hands all weights after ``in_proj`` to one
    kernel. An adapter on such a child would do nothing.

    Args:
        parent: the module that owns the child.
        child: the child's name in it.
    """
    if isinstance(parent, MultiheadAttention):
        return True
    kernel = {"conv1d", "dt_proj", "x_proj", "out_proj"}
    return child in kernel and {"A_log", "D"} <= parent._parameters.keys()


def base_modules(model: Module) -> dict[str, Module]:
    """The model's modules by name, adapters left out, shared ones once.

    Args:
        model: the root.
    """
    found: dict[str, Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen or isinstance(module, Adapters):
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            # the first child last, which is popped first
            waiting += [(prefix + n, m) for n, m in reversed(module._modules.items()) if m is not None]
    return found


def output_heads(model: Module) -> list[str]:
    """Names of the modules that turn hidden states into the task's output, in models that say so.

    These are, for each transformers model below the root, its output embeddings and whatever lies beside its
    trunk (``base_model_prefix``), such as ``classifier`` or ``score``.

    Args:
        model: the root.
    """
    return _heads(base_modules(model))


def _heads(modules: dict[str, Module]) -> list[str]:
    names = {id(m): n for n, m in modules.items()}
    heads: set[str] = set()
    for name, part in modules.items():
        module: Any = part
        trunk = getattr(type(module), "base_model_prefix", None)
        if not isinstance(trunk, str) or not hasattr(module, "get_output_embeddings"):
            continue
        output = module.get_output_embeddings()
        if isinstance(output, Module) and id(output) in names:
            heads.add(names[id(output)])
        if trunk and isinstance(module._modules.get(trunk), Module):
            prefix = f"{name}." if name else ""
            children = (n for n in module._modules if n not in (trunk, "adapters"))
            heads.update(f"{prefix}{n}" for n in children if _has_parameters(module._modules[n]))
    return sorted(heads)


def _has_parameters(module: Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def is_within(name: str, parents: Container[str]) -> bool:
    """Whether a dotted name is one of the parents or lies below one.

    Args:
        name: the name.
        parents: names; where they are many, a set or a dictionary is looked up fastest.
    """
    if name in parents:
        return True
    dot = name.find(".")
    while dot >= 0:
        if name[:dot] in parents:
            return True
        dot = name.find(".", dot + 1)
    return False


def matches(name: str, pattern: str) -> bool:
    """Whether a list's pattern names a module: exactly, or as a dotted suffix."""
    return name == pattern or name.endswith(f".{pattern}")


def endings(name: str) -> list[str]:
    """All patterns of a list that name a module: its name, and what follows each dot in it.

    Args:
        name: the module's dotted name.
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def unmatched(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The patterns of a list that name none of the modules; a file may have many of them.

    Args:
        patterns: exact names or dotted suffixes.
        names: the modules' names.
    """
    known = {ending for name in names for ending in endings(name)}
    return [p for p in patterns if p not in known]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules that a list names, in their own order.

    Args:
        patterns: exact names or dotted suffixes.
        names: the modules' names.
    """
    wanted = set(patterns)
    return [n for n in names if not wanted.isdisjoint(endings(n))]


def layer_number(name: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that a module lies in.

    Args:
        name: the module's dotted name; its first number counts.

    Returns:
        ``("encoder.layer", 3)`` for ``encoder.layer.3.output.dense``, or None outside any numbered stack.
    """
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name)
    return (found.group(1) or "", int(found.group(2))) if found else None


def match_modules(
    model: Module,
    target: str | Sequence[str],
    *,
    exclude: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    suits: Callable[[Module], bool] | None = None,
    kinds: str = "module",
    option: str = "target_modules",
) -> list[str]:
    """The modules that patterns mean, in the model's order.

    Args:
        model: the root; the names are relative to it.
        target: a list of exact names or dotted suffixes, a string as a regular expression that matches the
            whole name, or ``"all-linear"`` for every Linear and Conv1D but the output head and those whose
            weights another module reads past their forward.
        exclude: patterns in the same two forms, taken away again.
        layers: only modules in layers of these numbers.
        suits: tells a module that the method can work on; a match by name that does not suit is an error.
        kinds: what ``suits`` stands for, for the error.
        option: the option's name, for the error.

    Returns:
        The names.

    Raises:
        ValueError: if a pattern, an excluded one or a layer's number matches nothing, or what it matches does
            not suit; the nearest names are listed.
    """
    modules = base_modules(model)
    if target == ALL_LINEAR:
        found = _all_linear(model, modules)
    else:
        candidates = {n: m for n, m in modules.items() if n}
        named = _match(candidates, target, option)
        found = [n for n in named if suits is None or suits(modules[n])]
        if isinstance(target, str):
            groups = [(repr(target), named)]
        else:
            by_ending: dict[str, list[str]] = {}
            for name in named if suits is not None else ():
                for ending in endings(name):
                    by_ending.setdefault(ending, []).append(name)
            groups = [(repr(p), by_ending[p]) for p in dict.fromkeys(target)] if suits is not None else []
        for pattern, hits in groups:
            if suits is not None and not any(suits(modules[n]) for n in hits):
                first = hits[0]
                raise ValueError(
                    f"{option}: {pattern} matches {first!r}, {an(class_of(modules[first]).__name__)}; expected {kinds}"
                )
    if exclude:
        gone = set(_match({n: modules[n] for n in found}, exclude, "exclude_modules"))
        found = [n for n in found if n not in gone]
        if not found:
            raise ValueError(f"exclude_modules={exclude!r} leaves nothing of {option}={target!r}")
    if layers is not None:
        found = _in_layers(found, [layers] if isinstance(layers, int) else list(layers))
    return found


def _all_linear(model: Module, modules: dict[str, Module]) -> list[str]:
    heads = _heads(modules)
    found: list[str] = []
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if child and reads_directly(modules[parent], child):
            continue
        if _gives_more(class_of(module)):
            continue
        if isinstance(module, (Linear, MultiheadAttention)) or is_conv1d(module):
            found.append(name)
    found = [n for n in found if not is_within(n, heads)]
    if not found:
        raise ValueError(
            f"target_modules='all-linear' found no Linear in {class_of(model).__name__}, output head aside; "
            "name the modules instead"
        )
    return found


def _gives_more(cls: type[Module]) -> bool:
    """Whether a model has made something else of a Linear, such as Llama 4's router, which gives scores and logits."""
    return issubclass(cls, Linear) and cls.forward is not Linear.forward and cls.__name__.endswith("Router")


def _match(modules: dict[str, Module], patterns: str | Sequence[str], option: str) -> list[str]:
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{option}={patterns!r} is no regular expression: {error}") from error
        found = [n for n in modules if expression.fullmatch(n)]
        if not found:
            hint = nearest(patterns, [*modules, ALL_LINEAR] if option == "target_modules" else modules)
            raise ValueError(f"{option}={patterns!r}, a regular expression for the whole name, matches no module{hint}")
        return found
    if not patterns:
        raise ValueError(f"{option} is empty; name at least one module")
    lost = unmatched(patterns, modules)
    if lost:
        alone = f"; write {option}={ALL_LINEAR!r}, not as a list"
        hints = [f"{p!r} matches no module{alone if p == ALL_LINEAR else nearest(p, modules)}" for p in lost[:_SHOWN]]
        raise ValueError(f"{option}: " + "; ".join(hints) + and_more(len(lost) - _SHOWN))
    return matching(patterns, modules)


def _in_layers(names: list[str], wanted: list[int]) -> list[str]:
    if not wanted:
        raise ValueError("layers_to_transform is empty; name at least one layer, or leave it out to take all")
    numbers = {n: layer_number(n) for n in names}
    present, asked = sorted({number[1] for number in numbers.values() if number is not None}), set(wanted)
    lost = sorted(asked.difference(present))
    if lost:
        there = f"0 to {present[-1]}" if present == list(range(len(present))) and present else present
        raise ValueError(f"layers_to_transform: no module in layer {lost}; the matched modules lie in layers {there}")
    return [n for n, number in numbers.items() if number is not None and number[1] in asked]
