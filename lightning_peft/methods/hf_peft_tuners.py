"""Tuners of Hugging Face PEFT that wrap modules: made on a twin of the model, taken from there as adapter layers."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_peft.core.fingerprint import parameter_digests
from lightning_peft.core.in_place import base_parameters
from lightning_peft.core.layer import AdapterLayer
from lightning_peft.core.method import Placement
from lightning_peft.core.twin import bare_twin
from lightning_peft.methods.hf_peft_layers import PEFT_NAME, PeftLayer, TaskIds


def place_tuner(model: Module, config: Any, *, is_saved: Callable[[str], bool]) -> Placement:
    """PEFT's layers for a model, which stays as it is.

    Args:
        model: the root.
        config: a `peft.PeftConfig` of a tuner that has layers.
        is_saved: tells the name of a module that trains in full, and so gets no layer.

    Raises:
        ValueError: if PEFT has no layer for a module, or the tuner does more to the model than wrapping modules.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind, cls = config.peft_type.value, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    before = parameter_digests(base_parameters(model))
    twin = bare_twin(model)
    shared = {id(p): (p, p.requires_grad) for p in twin.parameters() if type(p) is not Parameter}
    memory = [(p, p.data_ptr()) for p in twin.parameters()]
    originals = dict(twin.named_modules())
    hooks = {n: _hooks(m) for n, m in originals.items()}
    root = Module()  # PEFT's own names begin at what holds the tuner
    try:
        with warnings.catch_warnings():
            # which options a kind of module makes it ignore, and the like; what would be wrong is refused below
            warnings.simplefilter("ignore")
            root.base_model = cls(twin, {PEFT_NAME: config}, PEFT_NAME)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        raise ValueError(f"HFPeft({kind}): peft says: {error}") from error
    finally:
        for parameter, flag in shared.values():
            parameter.requires_grad_(flag)
    if parameter_digests(base_parameters(model)) != before:
        raise ValueError(f"HFPeft({kind}): the tuner has changed the base's weights; load the base anew")
    if any(p.data_ptr() != pointer for p, pointer in memory):
        raise ValueError(f"HFPeft({kind}): with these options the tuner starts by exchanging the base's weights")
    if any(_hooks(m) != hooks[n] for n, m in originals.items()):
        raise ValueError(f"HFPeft({kind}): the tuner hooks the model's forward, beside putting layers around modules")
    wrappers = _wrappers(kind, twin, originals)
    files = _file_names(kind, root, config, wrappers)
    takes_task_ids = "task_ids" in inspect.signature(cls.forward).parameters
    in_base_dtype = any(_stay_in_base_dtype(root.base_model, *wrapper) for wrapper in list(wrappers.values())[:1])
    layers: dict[str, AdapterLayer] = {}
    for name, (wrapper, socket) in wrappers.items():
        if not is_saved(name):
            layers[name] = PeftLayer(
                wrapper,
                socket,
                model.get_submodule(name),
                files[name],
                in_base_dtype=in_base_dtype,
                takes_task_ids=takes_task_ids,
            )
    if takes_task_ids:
        layers[""] = TaskIds()
    return Placement(layers)


def has_merge(tuner: Any) -> bool:
    """Whether PEFT's layers of a tuner's kind can be merged.

    Args:
        tuner: the tuner's class; a prompt's has no layers.
    """
    kind = getattr(tuner, "tuner_layer_cls", None)
    if kind is None:
        return False
    layers = [c for c in vars(sys.modules[kind.__module__]).values() if isinstance(c, type) and issubclass(c, kind)]
    return any(_has_merge(c) for c in layers)


def _has_merge(layer: Any) -> bool:
    if not hasattr(layer, "merge"):
        return False
    try:
        layer.merge(object.__new__(layer))
    except NotImplementedError:  # some have a merge that only says so
        return False
    except Exception:  # it has begun, with nothing to merge
        return True
    return True


def _wrappers(kind: str, twin: Module, originals: dict[str, Module]) -> dict[str, tuple[Any, str]]:
    """What stands in the twin where a module of the base was, and under which name it holds that module."""
    now = dict(twin.named_modules())
    found: dict[str, tuple[Any, str]] = {}
    for name, original in originals.items():
        wrapper = now.get(name)
        if wrapper is original or wrapper is None:
            continue
        socket = next((n for n, child in wrapper._modules.items() if child is original), None)
        if socket is None:
            raise ValueError(f"HFPeft({kind}): the tuner exchanges {name!r} instead of putting a layer around it")
        known = {id(m) for m in originals.values()}
        if any(id(part) not in known for part in original.modules()):
            raise ValueError(f"HFPeft({kind}): the tuner also exchanges parts of {name!r}; name them instead")
        found[name] = (wrapper, socket)
    return found


def _hooks(module: Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _file_names(
    kind: str, root: Any, config: Any, wrappers: dict[str, tuple[Any, str]]
) -> dict[str, dict[str, str | None]]:
    """The names in a PEFT file of each layer's tensors, which PEFT itself tells.

    What PEFT makes anew from the configuration whenever it loads, its files do not have; here such a buffer is not
    in the adapter's state either.
    """
    tuner = root.base_model
    saved = type(tuner)._get_adapter_state_dict(
        model=root,
        config=config,
        adapter_name=PEFT_NAME,
        state_dict=root.state_dict(keep_vars=True),
        unwanted_adapter_names=[],
    )
    by_identity = {id(t): k for k, t in saved.items()}
    names: dict[str, dict[str, str | None]] = {}
    reached: set[int] = set()
    for wrapper, _ in wrappers.values():
        _register_tensors(wrapper)
    for name, (wrapper, socket) in wrappers.items():
        own: dict[str, str | None] = {}
        for path, tensor in _tensors_beside(wrapper, socket).items():
            key = f"base_model.model.{name}.{path}"
            stored = key if key in saved else by_identity.get(id(tensor))
            own[path] = None if stored is None else type(tuner)._remove_adapter_name_from_key(stored, PEFT_NAME)
            reached.add(id(tensor))
            if stored is None:
                _leave_out(wrapper, path)
        names[name] = own
    lost = [k for k, t in saved.items() if id(t) not in reached]
    if lost:
        raise ValueError(f"HFPeft({kind}): peft saves {lost[0]!r} in another form than its layers hold it")
    return names


def _stay_in_base_dtype(tuner: Any, wrapper: Module, socket: str) -> bool:
    """Whether PEFT leaves trained tensors in the base's dtype, found by letting it cast a 16-bit copy of a layer."""
    scratch = copy.deepcopy(wrapper).bfloat16()
    model = tuner._modules["model"]
    tuner._modules["model"] = scratch
    try:
        if hasattr(tuner, "_cast_adapter_dtype"):
            tuner._cast_adapter_dtype(adapter_name=PEFT_NAME, autocast_adapter_dtype=True)
    finally:
        tuner._modules["model"] = model
    trained = [p for n, p in scratch.named_parameters() if p.requires_grad and not n.startswith(f"{socket}.")]
    return any(p.dtype == torch.bfloat16 for p in trained)


def _tensors_beside(wrapper: Module, socket: str) -> dict[str, Tensor]:
    """The wrapper's state without that of the wrapped module."""
    state = wrapper.state_dict(keep_vars=True)
    return {k: t for k, t in state.items() if not k.startswith(f"{socket}.")}


def _register_tensors(wrapper: Module) -> None:
    """Makes tensors that a layer keeps beside torch's registers its own, so that they move and are saved."""
    from peft.tuners._buffer_dict import BufferDict

    for name, value in [item for item in vars(wrapper).items() if item[0] not in vars(Module())]:
        if isinstance(value, BufferDict):
            del wrapper.__dict__[name]
            wrapper._modules[name] = value
        if type(value) is dict and value and all(isinstance(v, Tensor) for v in value.values()):
            del wrapper.__dict__[name]
            setattr(wrapper, name, BufferDict(value, persistent=True))


def _leave_out(wrapper: Module, path: str) -> None:
    place, _, leaf = path.rpartition(".")
    owner = wrapper.get_submodule(place)
    if leaf in owner._buffers:
        owner._non_persistent_buffers_set.add(leaf)
