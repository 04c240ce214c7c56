"""The plan: what an adapter trains where, in numbers and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.modules.conv import _ConvNd

from lightning_peft.analysis.sizes import size
from lightning_peft.core.adapters import adapters_of, tree_of
from lightning_peft.core.in_place import own_parameters
from lightning_peft.core.matching import base_modules, class_of, is_conv1d, is_within, output_heads
from lightning_peft.core.quantized import is_quantized, memory, number_of
from lightning_peft.core.tree import AdapterTree


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan: parameters of one kind in places that differ by their layer's number only.

    Attributes:
        place: the modules' name, with ``*`` for the layers' numbers.
        what: what trains there.
        modules: how many modules.
        parameters: how many trained parameters.
        bytes: what these take, without gradients and optimizer states.
    """

    place: str
    what: str
    modules: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What an adapter trains, and what share of the model that is.

    Attributes:
        method: the method's name.
        rows: one for each place.
        trainable: trained parameters.
        total: parameters of the model, adapters aside.
        trainable_bytes: bytes of the trained parameters.
        saved_bytes: bytes of the tensors that are saved of the adapter.
        checkpoint_bytes: bytes of the tensors in a checkpoint: what is saved, what trains beside the adapter, and two
            numbers for each trained parameter, as optimizers of Adam's kind keep them.
        first: the layer of a stack, such as ``"encoder.layer.4"``, in which the first module lies that trains; ``""``
            where it lies in none.
        layers_before: how many layers of that stack come before it.
        originals_bytes: bytes of the base's originals that are kept beside what trains in place.
        merge_bytes: bytes of the originals that wait on the CPU while the adapter is merged; before it is, an upper
            bound: all weights of the modules that it changes. 0 if it cannot be merged.
        linears: linear layers of the base, output heads aside.
        covered: how many of them are adapted or train.
        notes: sentences on what a person might not expect.
    """

    method: str
    rows: tuple[PlanRow, ...]
    trainable: int
    total: int
    trainable_bytes: int
    saved_bytes: int
    checkpoint_bytes: int
    first: str
    layers_before: int
    originals_bytes: int
    merge_bytes: int
    linears: int
    covered: int
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Trained parameters divided by the model's."""
        return self.trainable / max(1, self.total)

    def __str__(self) -> str:
        """The plan as plain text, for logs and narrow terminals."""
        lines = [f"{self.method}: {self.summary}"]
        width = max((len(r.place) for r in self.rows), default=0)
        lines += [f"  {r.place:<{width}}  {r.what}, {r.modules} x, {r.parameters:,} parameters" for r in self.rows]
        return "\n".join([*lines, *(f"  {note}" for note in (self.storage, *self.notes))])

    @property
    def beginning(self) -> str:
        """One line: where the model begins to train; empty where that is the first layer of a stack, or in none."""
        if not self.layers_before:
            return ""
        many = "layer" if self.layers_before == 1 else f"{self.layers_before} layers"
        return f"Trains from {self.first} on; no backward pass goes through the {many} before it"

    @property
    def storage(self) -> str:
        """One line: what it takes on a disk."""
        return (
            f"Saved, it takes {size(self.saved_bytes)}; a checkpoint, with AdamW's state, {size(self.checkpoint_bytes)}"
        )

    @property
    def summary(self) -> str:
        """One line: how much trains of how much."""
        return (
            f"trains {self.trainable:,} parameters ({100 * self.share:.2f}% of the model's {self.total:,}, "
            f"{size(self.trainable_bytes)})"
        )


def plan_of(model: Module, name: str, path: str = "") -> Plan:
    """The plan of one adapter of a model.

    Args:
        model: the root.
        name: the adapter's name.
        path: the root's own name in what it is a part of, to stand before the places.

    Returns:
        The plan, as things stand now.
    """
    tree = tree_of(model, name)
    record = tree.record
    method = type(record.method).__name__
    entries: list[tuple[str, str, str, int, int]] = []
    copies = set(record.copies)
    for place, layer in tree.layers_by_module.items():
        fresh = place in copies and any(is_within(n, [place]) for n in record.new)
        what = "new, in full" if fresh else "a copy, in full" if place in copies else method
        trained = [p for p in _parameters(layer) if p.requires_grad]
        entries += [(_join(path, place), what, place, p.numel(), p.numel() * p.element_size()) for p in trained]
    modules = base_modules(model)
    base, new = own_parameters(modules), set(record.new)
    for key in record.in_place:
        tensor, owner = base[key], key.rpartition(".")[0]
        what = "new, in place" if key in new else "in place"
        entries.append((_join(path, owner), what, owner, tensor.numel(), tensor.numel() * tensor.element_size()))
    rows = _grouped(entries)
    trainable_bytes = sum(r.bytes for r in rows)
    saved_bytes = sum(map(_bytes, (*tree.state_dict().values(), *(base[key] for key in record.in_place))))
    first, layers_before = _beginning(
        modules, [*tree.layers_by_module, *(k.rpartition(".")[0] for k in record.in_place)]
    )
    names, covered = _coverage(model, modules, tree)
    merge_bytes = _merge_bytes(model, modules, name, tree)
    return Plan(
        method=method,
        rows=rows,
        trainable=sum(r.parameters for r in rows),
        total=sum(map(number_of, base.values())),
        trainable_bytes=trainable_bytes,
        saved_bytes=saved_bytes,
        checkpoint_bytes=saved_bytes + 2 * trainable_bytes,
        first=_join(path, first),
        layers_before=layers_before,
        originals_bytes=sum(map(_bytes, (record.originals or {}).values())),
        merge_bytes=merge_bytes,
        linears=len(names),
        covered=len(covered),
        notes=(
            *(_reach(names, covered, _unreached_stacks(modules, tree)) if _changes_weights(tree) else ()),
            *_notes([_join(path, n) for n in record.new], record.originals is None, method),
            *_costs(merge_bytes),
        ),
    )


def plan_within(outer: Module, path: str, name: str) -> Plan:
    """The plan of one adapter of a submodule, with what trains beside it.

    Args:
        outer: the module that trains, such as a LightningModule.
        path: the adapted submodule's name in it; ``""`` if it is the module itself.
        name: the adapter's name.

    Returns:
        The plan, its places named from ``outer``.
    """
    root = outer.get_submodule(path)
    plan = plan_of(root, name, path)
    inside = {id(p) for p in root.parameters()}
    outside = {n: p for n, p in outer.named_parameters() if id(p) not in inside}
    trained = [(n.rpartition(".")[0], p) for n, p in outside.items() if p.requires_grad]
    beside = _grouped(
        [(o, "outside the adapted submodule, trains as before", o, p.numel(), _bytes(p)) for o, p in trained]
    )
    return replace(
        plan,
        rows=(*plan.rows, *beside),
        trainable=plan.trainable + sum(r.parameters for r in beside),
        total=plan.total + sum(map(number_of, outside.values())),
        trainable_bytes=plan.trainable_bytes + sum(r.bytes for r in beside),
        checkpoint_bytes=plan.checkpoint_bytes + 3 * sum(r.bytes for r in beside),
        # what trains before the adapted submodule needs a backward pass through all of it
        layers_before=0 if beside else plan.layers_before,
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _merge_bytes(model: Module, modules: dict[str, Module], name: str, tree: AdapterTree) -> int:
    adapters = adapters_of(model)
    merged = None if adapters is None else adapters.merged.get(name)
    if merged is False or not tree.record.method.mergeable:
        return 0
    places = {p for p in tree.layers_by_module if p}
    if adapters is not None and merged:
        parameters = [p for key, p in adapters.originals.items() if is_within(key, places)]
    else:
        parameters = [p for place in places for p in _parameters(modules[place])]
    distinct = {id(p): p for p in parameters}.values()
    return sum(memory(p) for p in distinct if p.is_floating_point() or is_quantized(p))


def _parameters(module: Module) -> Iterable[Parameter]:
    """A module's parameters, without the walk below it where nothing is, which is nearly all that it costs."""
    return module.parameters() if module._modules else (p for p in module._parameters.values() if p is not None)


def _costs(merge_bytes: int) -> list[str]:
    if not merge_bytes:
        return []
    return [f"Merging keeps up to {size(merge_bytes)} of original weights on the CPU, or none (keep_originals=False)"]


def _beginning(modules: dict[str, Module], places: Iterable[str]) -> tuple[str, int]:
    """The layer in which the first module lies that trains, and how many layers of its stack come before it.

    Layers of a stack run in their order; of other modules the order in which a model defines them says little.
    """
    trained = set(places)
    parts = next((name for name in modules if name in trained), "").split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "", 0
    stack = modules[".".join(parts[:number])]
    return ".".join(parts[: number + 1]), list(stack._modules).index(parts[number])


def _grouped(entries: list[tuple[str, str, str, int, int]]) -> tuple[PlanRow, ...]:
    rows: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    patterns = {p: ".".join("*" if part.isdigit() else part for part in p.split(".")) for p in {e[0] for e in entries}}
    for place, what, module, count, taken in entries:
        rows.setdefault((patterns[place] or "(model)", what), []).append((module, count, taken))
    return tuple(
        PlanRow(
            place,
            what,
            len({m for m, _, _ in items}),
            sum(c for _, c, _ in items),
            sum(s for _, _, s in items),
        )
        for (place, what), items in rows.items()
    )


def _coverage(model: Module, modules: dict[str, Module], tree: AdapterTree) -> tuple[list[str], list[str]]:
    """The linear layers that are no output heads, and those of them that are adapted or train."""
    heads = output_heads(model)
    names = [
        n for n, m in modules.items() if (issubclass(class_of(m), Linear) or is_conv1d(m)) and not is_within(n, heads)
    ]
    places = {n for n in tree.layers_by_module if n}
    trained = {k.rpartition(".")[0] for k in tree.record.in_place}
    return names, [n for n in names if is_within(n, places) or n in trained]


def _unreached_stacks(modules: dict[str, Module], tree: AdapterTree) -> dict[str, int]:
    """Sizes of the stacks of matrices, as mixtures of experts have them, in modules without a layer of the adapter."""
    places, in_place = {n for n in tree.layers_by_module if n}, set(tree.record.in_place)
    found: dict[str, int] = {}
    for name, module in modules.items():
        if isinstance(module, _ConvNd) or is_within(name, places):
            continue
        for child, parameter in module._parameters.items():
            # a single matrix with a batch dimension is a table of positions or the like
            if parameter is None or parameter.dim() != 3 or len(parameter) == 1 or not parameter.is_floating_point():
                continue
            key = _join(name, child)
            if key not in in_place:
                found[key] = parameter.numel()
    return found


def _changes_weights(tree: AdapterTree) -> bool:
    """Whether the method is about weights at all, and not about what goes into a block or comes out of it."""
    record = tree.record
    return record.method.mergeable or any(key not in record.new for key in record.in_place)


def _reach(linears: list[str], covered: list[str], stacks: dict[str, int]) -> list[str]:
    if not linears or not covered:
        return []
    notes = [f"Reaches {len(covered)} of {len(linears)} linear layers, output heads aside{_but(linears, covered)}"]
    if stacks:
        names = sorted({".".join(n.split(".")[-2:]) for n in stacks})
        notes.append(
            f"{sum(stacks.values()):,} parameters are experts' stacked weights, which are not reached; LoRA "
            f"reaches them by name: target_parameters={names}"
        )
    return notes


def _but(linears: list[str], covered: list[str]) -> str:
    """The layers that are reached nowhere, by the names that a pattern would have to match."""
    reached, names = ({".".join(n.split(".")[-2:]) for n in chosen} for chosen in (covered, linears))
    left = sorted(n for n in names - reached if not n.rpartition(".")[2].isdigit())
    return f"; not {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}" if left else ""


def _notes(new: list[str], no_originals: bool, method: str) -> list[str]:
    notes: list[str] = []
    if new:
        shown = ", ".join(new[:4]) + (", ..." if len(new) > 4 else "")
        notes.append(f"New in this model, so trained in full and saved without being asked for: {shown}")
    if no_originals:
        notes.append(f"{method} trains in place and keeps no originals: the base cannot be given back")
    return notes
