"""Parameters that the base's checkpoint lacked: they were just initialised, so every method trains them."""

from __future__ import annotations

from torch.nn import Module

from lightning_peft.core.in_place import own_parameters
from lightning_peft.core.matching import base_modules
from lightning_peft.core.quantized import is_quantized


def new_parameters(modules: dict[str, Module]) -> list[str]:
    """Names of the parameters that ``from_pretrained`` did not find in the checkpoint.

    transformers marks what it loaded (``_is_hf_initialized`` on the parameter). A model without any mark,
    made from a config or by hand, has no new parameters: then all of it is the base.

    Args:
        modules: the model's own, as `base_modules` gives them.
    """
    new: list[str] = []
    roots = {n: m for n, m in modules.items() if hasattr(type(m), "base_model_prefix")}
    for prefix, module in roots.items():
        if any(prefix.startswith(n) for n in new):
            continue
        # of the base alone: what adapters hold is not new, and a walk through many of them takes long
        own = own_parameters(base_modules(module))
        named = {f"{prefix}.{n}" if prefix else n: p for n, p in own.items()}
        loaded = {n for n, p in named.items() if getattr(p, "_is_hf_initialized", False)}
        if loaded:
            # a cast takes the mark off torchao's weights; what is quantized was loaded
            new += [n for n, p in named.items() if n not in loaded and not is_quantized(p)]
    return sorted(set(new))


def new_modules(model: Module, parameters: list[str]) -> tuple[list[str], list[str]]:
    """The largest modules that are new as a whole, and the new parameters outside them.

    Args:
        model: the root.
        parameters: names of the new parameters.

    Returns:
        Names of modules, and names of single parameters whose module also holds loaded ones.
    """
    if not parameters:
        return [], []
    wanted = set(parameters)
    new = {id(p) for n, p in model.named_parameters() if n in wanted}
    whole: list[str] = []
    for name, module in base_modules(model).items():
        inside = [id(p) for p in module.parameters()]
        if name and inside and all(p in new for p in inside) and not any(name.startswith(f"{w}.") for w in whole):
            whole.append(name)
    rest = [n for n in parameters if not any(n.startswith(f"{w}.") for w in whole)]
    return whole, rest
