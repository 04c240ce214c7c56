"""Putting an adapter into a model and taking it out again."""

from __future__ import annotations

import copy
import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch.nn import Module, MultiheadAttention, Parameter, TransformerEncoder, TransformerEncoderLayer

from lightning_peft.core.adapted import attach, detach, site_of
from lightning_peft.core.adapters import Adapters, adapters_of, refuse_in_use, tree_of
from lightning_peft.core.collector import paused_collector
from lightning_peft.core.fingerprint import parameter_digests
from lightning_peft.core.in_place import base_parameters, base_tensors, kept_originals, own_parameters, set_in_place
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.matching import base_modules, class_of, is_within, match_modules, reads_directly
from lightning_peft.core.method import Bounded, Method, Placement, Residual
from lightning_peft.core.new_heads import new_modules, new_parameters
from lightning_peft.core.quantized import keep_codes, refuse_training
from lightning_peft.core.saved_module import SavedModule
from lightning_peft.core.sharded import sharded_modules
from lightning_peft.core.split import refuse_split, share_whole
from lightning_peft.core.statistics import freeze_statistics, moving_statistics
from lightning_peft.core.tree import AdapterTree, Record

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()


def _one_at_a_time(change: Callable[P, R]) -> Callable[P, R]:
    """Lets threads that add and remove adapters wait for each other; forwards go on meanwhile."""

    @functools.wraps(change)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock, paused_collector():
            return change(*args, **kwargs)

    return alone


@_one_at_a_time
def inject(
    model: Module,
    method: Method,
    name: str = "default",
    *,
    also_in_place: Sequence[str] = (),
    saved: bool = False,
    active: bool = True,
) -> AdapterTree:
    """Freezes a model, puts the layers of a method around its modules and makes the new adapter the active one.

    Adapters that are there already go on training, or not, as before.

    Nothing is changed if anything about the method does not fit the model.

    Args:
        model: any module; it is adapted in place.
        method: the recipe.
        name: the adapter's name; letters, digits, ``_`` and ``-``.
        also_in_place: parameters of the base that train in place beside those that the method chooses: new ones
            that a saved adapter brings along.
        saved: whether the adapter is one that was saved, whose numbers stand as they are.
        active: False leaves those active that are; for adapters whose numbers are still to be filled in.

    Returns:
        The adapter.

    Raises:
        ValueError: if the name is taken or unusable, if something in the model is already called ``adapters`` or was
            wrapped by ``torch.compile``, or if the method does not fit the model.
    """
    modules = base_modules(model)
    adapters = _checked_adapters(model, modules, name)
    if sharded_modules(model):
        raise ValueError(
            "the model is sharded already, and what is added now would not be; call adapt(model, method) first and "
            "fully_shard(model) then"
        )
    keep_codes(modules.values())
    parameters = own_parameters(modules)
    before = {n: p.requires_grad for n, p in parameters.items()}
    new = new_parameters(modules)
    placement = method.place(model)
    if isinstance(method, Bounded) and not saved:
        method.refuse_beyond(model, placement.layers)
    if isinstance(method, Residual) and method.needs_codes and not saved:
        method.make_up(model, placement.layers)
    copies, single = _copies(model, modules, method, placement, new)
    in_place = [n for n in dict.fromkeys([*placement.in_place, *single, *also_in_place]) if not is_within(n, copies)]
    _refuse_quantized(parameters, method, in_place, copies)
    refuse_split(parameters, method, placement.layers, in_place, copies)
    layers = placement.layers | {n: SavedModule(_plain(model.get_submodule(n))) for n in copies}
    share_whole(parameters, layers)
    if not layers and not in_place:
        raise ValueError(f"{type(method).__name__} finds nothing to train in {class_of(model).__name__}")
    _refuse_unreachable(modules, layers)
    _refuse_shared_in_place(adapters, in_place)

    if adapters is None:
        adapters = Adapters()
        adapters.requires_grad_before = before
        adapters.base_digests = parameter_digests(parameters)
    originals = None
    if placement.keep_originals:
        tensors = base_tensors(model) if in_place else {}
        moving = [*in_place, *moving_statistics(model, in_place)]
        originals = {n: tensors[n].detach().clone() for n in moving}
    record = Record(method, sorted(placement.layers), copies, new, in_place, originals)
    tree = AdapterTree(record, layers)
    if not model.training or any(layer._modules or not layer.training for layer in layers.values()):
        tree.train(model.training)  # new layers are in training mode, and what they took over may not be
    adapters[name] = tree
    _connect(model, modules, parameters, adapters, name, tree)
    if active:
        adapters.switch.active = (name,)
    return tree


@_one_at_a_time
def eject(model: Module, name: str) -> None:
    """Takes an adapter out; with the last one the model is what it was before.

    Forwards that other threads began with the adapter end with it; what begins meanwhile runs without it.

    Args:
        model: the root.
        name: the adapter's name.

    Raises:
        RuntimeError: if the method trained the base in place and kept no originals, or the adapter is in use in an
            ``adapter_names`` block or in a forward of this thread.
    """
    adapters = adapters_of(model)
    assert adapters is not None
    originals = kept_originals(tree_of(model, name), "remove()")
    tensors = base_tensors(model)
    switch = adapters.switch
    with switch.changing:
        refuse_in_use(adapters, name)
        switch.active = tuple(n for n in switch.active if n != name)
        del adapters[name], switch.numbers[name]
        switch.await_end(name)
    for key, value in originals.items():
        tensors[key].data = value.to(tensors[key].device)  # the model may have moved since
    for module in base_modules(model).values():
        site = site_of(module)
        if site is not None:
            site.layers.pop(name, None)
    in_place = adapters.in_place
    set_in_place(base_modules(model), adapters, in_place)
    for key, parameter in base_parameters(model).items():
        if not len(adapters):
            parameter.requires_grad_(adapters.requires_grad_before.get(key, True))
        elif key not in in_place:
            parameter.requires_grad_(False)
    if not len(adapters):
        training = {n: m.training for n, m in base_modules(model).items()}
        del model._modules["adapters"]
        for key, module in base_modules(model).items():
            site = site_of(module)
            if site is not None and site.frozen_statistics:
                training[key] = model.training
            detach(module)
            module.training = training[key]


def _checked_adapters(model: Module, modules: dict[str, Module], name: str) -> Adapters | None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(Adapters, name):
        raise ValueError(f"an adapter's name consists of letters, digits, '_' and '-', but got {name!r}")
    adapters = adapters_of(model)
    if adapters is None and hasattr(model, "adapters"):
        raise ValueError(
            f"{class_of(model).__name__} already has an attribute 'adapters', where the adapters would go; "
            "rename it, or adapt a submodule"
        )
    if adapters is None:
        wrapped = [n for n, m in modules.items() if "_orig_mod" in m._modules]
        if wrapped:
            raise ValueError(
                f"{wrapped[0] or 'the model'!r} was wrapped by torch.compile(), which puts _orig_mod into the name of "
                "everything in it, so that what is saved would fit nothing else; call its compile() instead, which "
                "keeps the names, or adapt first and compile then"
            )
        taken = [n for n, m in modules.items() if site_of(m) is not None]
        if taken:
            raise ValueError(
                f"{taken[0] or 'the model'!r} is already adapted as part of another model; adapt the outermost "
                "model only, or remove() the other adapter first"
            )
    if adapters is not None and name in adapters:
        raise ValueError(f"there is already an adapter {name!r}; its names are {sorted(adapters)}")
    return adapters


def _copies(
    model: Module, modules: dict[str, Module], method: Method, placement: Placement, new: list[str]
) -> tuple[list[str], list[str]]:
    """Modules that train in full as copies, and new parameters that do in place.

    What trains in full has no use for a change of its weights beside it, so such layers are dropped. A layer that acts
    on what goes in or comes out stays on a new module, whose parameters train in place then: a copy would run in place
    of what the layer stands around.
    """
    asked = match_modules(model, method.modules_to_save, option="modules_to_save") if method.modules_to_save else []
    covered = set(placement.in_place)
    whole, single = new_modules(model, [n for n in new if n not in covered])
    for inside in [n for n in placement.layers if n and is_within(n, [*asked, *(whole if method.mergeable else [])])]:
        del placement.layers[inside]
    fixed = [n for n in whole if any(is_within(p, [n]) for p in placement.layers) or _is_read_directly(modules, n)]
    copies = [*asked, *(n for n in whole if n not in fixed and not is_within(n, asked))]
    outermost = [n for n in copies if not is_within(n, [c for c in copies if c != n])]
    in_place = [*single, *(n for n in new if is_within(n, fixed))]
    return outermost, [n for n in in_place if not is_within(n, outermost)]


def _is_read_directly(modules: dict[str, Module], name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return bool(child) and reads_directly(modules[parent], child)


def _plain(module: Module) -> Module:
    """The module itself if nothing in it is adapted, else a copy from which adapters are taken off."""
    if all(site_of(m) is None for m in module.modules()):
        return module
    twin = copy.deepcopy(module)
    for part in twin.modules():
        detach(part)
    return twin


def _refuse_unreachable(modules: dict[str, Module], layers: dict[str, AdapterLayer]) -> None:
    for name in layers:
        if _is_read_directly(modules, name):
            parent = name.rpartition(".")[0]
            owner = modules[parent]
            whole = isinstance(owner, MultiheadAttention)
            instead = f"the attention module {parent or 'itself'!r}" if whole else f"{parent}.in_proj"
            raise ValueError(
                f"{name!r}: {class_of(owner).__name__} reads its weights and does not always call it, so an adapter "
                f"on it would do nothing; name {instead} instead, or exclude it"
            )


def _refuse_quantized(parameters: dict[str, Parameter], method: Method, in_place: list[str], copies: list[str]) -> None:
    trained, copied = set(in_place), set(copies)
    for name, parameter in parameters.items() if trained or copied else ():
        if name in trained or is_within(name, copied):
            refuse_training(type(method).__name__, name, parameter)


def _refuse_shared_in_place(adapters: Adapters | None, in_place: list[str]) -> None:
    if adapters is None:
        return
    waiting = sorted(set(in_place) & adapters.originals.keys())
    if waiting:
        raise ValueError(f"{waiting[0]!r} would train in place, but an adapter is merged into it; unmerge() that first")
    for name, tree in adapters.trees.items():
        shared = sorted(set(in_place) & set(tree.record.in_place))
        if shared:
            raise ValueError(
                f"the adapter {name!r} already trains {shared[0]!r} in place ({len(shared)} shared parameters); "
                "two adapters can share trained modules only as copies (modules_to_save)"
            )


def _connect(
    model: Module,
    modules: dict[str, Module],
    parameters: dict[str, Parameter],
    adapters: Adapters,
    name: str,
    tree: AdapterTree,
) -> None:
    """The part of an injection that changes the model; nothing in it can fail for a reason of the user's."""
    adapters.switch.number(name)
    attach(model, adapters.switch, is_root=True)
    model._modules["adapters"] = adapters
    for place, layer in tree.layers_by_module.items():
        attach(modules[place], adapters.switch).layers[name] = layer
    in_place, own = adapters.in_place, set(tree.record.in_place)
    for key, parameter in parameters.items():
        # what another adapter trains in place may have been told to rest
        if key in own or key not in in_place:
            parameter.requires_grad_(key in in_place)
    set_in_place(modules, adapters, in_place)
    freeze_statistics(model, modules, adapters)
    _leave_fused_path(modules, adapters)


def _leave_fused_path(modules: dict[str, Module], adapters: Adapters) -> None:
    """Keeps torch's encoder layers that hold an adapted module off the path that would read past it."""
    for module in modules.values():
        if isinstance(module, (TransformerEncoderLayer, TransformerEncoder)) and any(
            site_of(part) is not None for part in module.modules() if part is not module
        ):
            attach(module, adapters.switch).off_fused_path = True
