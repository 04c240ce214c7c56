"""The ``inspect`` command: what an adapter holds, and what it changes of its base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_peft.analysis.change import Change, changes_of, matrices_of, own_matrices, product_change
from lightning_peft.analysis.inspection import Inspection
from lightning_peft.analysis.inspection_page import NUMBERS, refuse_existing, write_inspection_page
from lightning_peft.analysis.inspection_report import print_inspection
from lightning_peft.analysis.stored_factors import no_factors, stored_factors
from lightning_peft.cli.opened import Opened, on_base, opened
from lightning_peft.cli.report import short
from lightning_peft.core.method import Method
from lightning_peft.formats.reading import naming
from lightning_peft.methods.lora import LoRA

if TYPE_CHECKING:
    from omegaconf import DictConfig


def show_inspection(config: DictConfig) -> Inspection:
    """Shows what an adapter's folder or checkpoint holds and changes; with ``to`` also writes it as a page.

    Raises:
        FileNotFoundError: if there is no such adapter.
        FileExistsError: if the folder of ``to`` holds a page already.
        ValueError: if a file is damaged, or the adapter does not fit the base.
    """
    if config.to is not None:
        refuse_existing(Path(config.to))
    if config.base is not None and not config.read_base:
        raise ValueError(f"base={config.base} is to be read, but read_base=false leaves the base out; give one of them")
    found = inspected(str(config.adapter), config.base, read_base=config.read_base, check_base=config.check_base)
    print_inspection(found)
    if config.to is not None:
        page = write_inspection_page(found, config.to)
        print(f"\nwith a heat map      {short(page)}\nas numbers           {short(page.with_name(NUMBERS))}")
    return found


def inspected(path: str, base: str | None = None, *, read_base: bool = True, check_base: bool = True) -> Inspection:
    """What an adapter's folder or checkpoint holds and changes.

    Args:
        path: the folder or checkpoint.
        base: a folder or a name on the hub; None takes what the file names.
        read_base: whether to look for the base at all; without it the changes of a LoRA are known, relative to nothing.
        check_base: refuse another base than the one it was trained on.

    Raises:
        FileNotFoundError: if there is no such adapter.
        ValueError: if a file is damaged, or the adapter does not fit the base.
    """
    files = opened(path)
    adapter, why = on_base(files, base, check_base=check_base) if read_base else (None, "read_base=false")
    options = asdict(cast(Any, files.method))
    if files.saved is not None and files.saved.foreign:
        del options["learning_rate"]  # of which such a file says nothing
    about: dict[str, Any] = {
        "path": path,
        "method": type(files.method).__name__,
        "options": options,
        "base": files.base,
        "tensors": files.entries,
        "size": files.size,
    }
    if adapter is None:
        if not files.method.mergeable:
            notes = [f"Without its base ({why}): {_no_weight(files.method)}"]
            alone = {n: t for n, t in files.tensors.items() if t.is_floating_point() and t.dim() > 1}
            own = [change for n, t in alone.items() for change in matrices_of(n, t)]
            return Inspection(**about, matrices=tuple(own), notes=tuple(notes))
        changes, notes = _without_base(files, str(why))
        return Inspection(**about, changes=tuple(changes), notes=tuple(notes))
    changes = changes_of(adapter.model, adapter.name)
    matrices = own_matrices(adapter.model, adapter.name)
    notes = []
    record = adapter.tree.record
    if matrices and not changes:
        notes.append(_no_weight(record.method))
    elif matrices:
        notes.append(f"{len(matrices)} matrices of layers that change no weight are in {NUMBERS} (to=...)")
    if record.new:
        notes.append(f"New in this model, so without a start to compare with: {', '.join(record.new[:4])}")
    lost = sorted(set(record.in_place) - set(record.originals or ()) - set(record.new))
    if lost:
        notes.append(f"Of another shape than in the base, so without a start to compare with: {', '.join(lost[:4])}")
    return Inspection(**about, changes=tuple(changes), matrices=tuple(matrices), notes=tuple(notes))


def _no_weight(method: Method) -> str:
    return (
        f"{type(method).__name__} changes no weight of the base, so nothing can be said relative to one; these are its "
        "own matrices"
    )


def _without_base(files: Opened, why: str) -> tuple[list[Change], list[str]]:
    """The changes that the file alone tells, and what it does not."""
    notes = [f"Without its base ({why}): norms of the changes alone, relative to nothing"]
    problem = no_factors(files.method)
    if problem is not None:
        return [], [f"Without its base ({why}) nothing is known of the changes: {problem}"]
    with naming(files.path):
        factors = stored_factors(files.method, files.tensors)
    assert isinstance(files.method, LoRA)
    if files.method.use_dora:
        notes.append("DoRA also scales the rows of the weights; these are the norms of B A alone, before that")
    if files.method.lora_bias:
        notes.append("The biases beside B (lora_bias) are not among the changes")
    return [product_change(f.place, *f.product) for f in factors], notes
