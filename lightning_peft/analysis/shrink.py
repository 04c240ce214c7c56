"""LoRA of a smaller rank: each change ``s B A`` replaced by the nearest one of that rank, from file to file.

The truncated singular value decomposition is the nearest matrix of its rank in the Frobenius norm (Eckart and Young,
1936). The strength ``s`` of each module stays what it is, so ``alpha`` follows the rank, and a bias beside B
(``lora_bias``) means what it did. Of a DoRA the lengths ``m`` stay too: the merged rows
``m_i (W + s B A)_i / |(W + s B A)_i|`` have them whatever ``B A`` is. What is nearest is the change in the brackets.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.analysis.spectrum import kept_energy, product_singular_values, rank_for
from lightning_peft.analysis.stored_factors import StoredFactors, no_factors, stored_factors
from lightning_peft.core.problems import an, raise_problems
from lightning_peft.formats.folder import MANIFEST, PEFT_CONFIG, read_folder
from lightning_peft.formats.reading import naming, read_json
from lightning_peft.formats.tensor_file import TENSORS, fitted, read_tensors, write_tensors
from lightning_peft.formats.writing import write_json, written_whole
from lightning_peft.methods.config import method_to_config
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_combine import best_factors

_BESIDE = re.compile(r"(?!trainer_)[\w.-]+\.(json|jinja|txt|model)")
"""What is copied: a tokenizer and its templates. A card would go on to speak of the rank that was."""


@dataclass(frozen=True)
class Shrunk:
    """What became of one change.

    Attributes:
        place: the module's name.
        before: the rank in the file.
        rank: the new one.
        squared: the squared Frobenius norm of the change before.
        kept: the share of it that is kept.
    """

    place: str
    before: int
    rank: int
    squared: float
    kept: float


def kept_in_all(changes: Sequence[Shrunk]) -> float:
    """The share of the squared norm of all changes together that is kept.

    Args:
        changes: as `shrink` gives them.
    """
    total = sum(c.squared for c in changes)
    return sum(c.squared * c.kept for c in changes) / total if total else 1.0


@torch.no_grad()
def shrink(source: str | Path, target: str | Path, r: int | None = None, energy: float | None = None) -> list[Shrunk]:
    """Writes a LoRA of smaller rank; the base is not needed.

    Args:
        source: the adapter's folder, ours or Hugging Face PEFT's; the target is in the same format.
        target: a folder that does not exist yet, or is empty.
        r: the new rank; modules of a lower one keep theirs.
        energy: instead, the share of the squared norm that each module is to keep, with as little rank as that takes.

    Returns:
        What became of each change.

    Raises:
        FileExistsError: if the target is there and holds something.
        ValueError: if the adapter is no LoRA on modules, a number is out of its range, or there is nothing to shrink.
    """
    source, target = Path(source), Path(target)
    check_numbers(r, energy)
    require_room(target)
    saved = read_folder(source)
    method = saved.method
    problem = no_factors(method)
    if problem is not None or not isinstance(method, LoRA):
        raise ValueError(
            f"{source}: shrink cuts the product of a LoRA's two factors, and this adapter is "
            f"{an(type(method).__name__)}: {problem}"
        )
    tensors = read_tensors(source)
    fitted(source, tensors, tensors)  # which refuses numbers that are not finite
    with naming(source):
        pairs = stored_factors(method, tensors)
    ranks = _ranks(pairs, r, energy)
    highest = max(len(pair.a) for pair in pairs)
    if all(ranks[pair.owner] >= len(pair.a) for pair in pairs):
        asked = f"r={r}" if r is not None else f"energy={energy}"
        raise ValueError(f"{source}: {asked} takes nothing away from ranks of up to {highest}; ask for less")
    cut = _with_ranks(method, pairs, ranks)
    shrunk = [_cut(tensors, pair, ranks[pair.owner]) for pair in pairs]
    with written_whole(target, last=(TENSORS, MANIFEST, PEFT_CONFIG)) as scratch:
        write_tensors(scratch, tensors)
        for file in source.iterdir():
            if file.is_file() and _BESIDE.fullmatch(file.name) and file.name not in (MANIFEST, PEFT_CONFIG):
                shutil.copyfile(file, scratch / file.name)
        _write_configs(source, scratch, cut, tensors)
    return shrunk


def require_room(target: Path) -> None:
    """Refuses to write where something is.

    Args:
        target: the folder to write.

    Raises:
        FileExistsError: if it is there and holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or move it away")


def check_numbers(r: Any, energy: Any) -> None:
    """Refuses what is no rank or share, or both or none of them.

    Args:
        r: the new rank, or None.
        energy: the share to keep, or None.

    Raises:
        ValueError: if so.
    """
    whole = isinstance(r, int) and not isinstance(r, bool)
    share = isinstance(energy, int | float) and not isinstance(energy, bool)
    raise_problems(
        "shrink",
        [
            "one of r (the new rank) and energy (the share of the squared norm to keep) is to be given, not "
            + ("both" if r is not None else "none")
            if (r is None) == (energy is None)
            else None,
            f"r must be a whole number of 1 or more, but got {r!r}"
            if r is not None and not (whole and r > 0)
            else None,
            f"energy must lie between 0 and 1, but got {energy!r}"
            if energy is not None and not (share and 0 < energy < 1)
            else None,
        ],
    )


def _ranks(pairs: Sequence[StoredFactors], r: int | None, energy: float | None) -> dict[str, int]:
    """The new rank of each module; those of one owner share it."""
    ranks: dict[str, int] = {}
    for pair in pairs:
        if energy is None:
            wanted = min(r or 1, len(pair.a))
        else:
            wanted = max(1, rank_for(product_singular_values(pair.a, pair.b), energy))
        ranks[pair.owner] = max(wanted, ranks.get(pair.owner, 1))
    return ranks


def _cut(tensors: dict[str, Tensor], pair: StoredFactors, rank: int) -> Shrunk:
    """Puts the shorter factors in place of a pair."""
    values = product_singular_values(*pair.product)
    for key, factor in zip(pair.keys, best_factors(pair.a.double(), pair.b.double(), rank), strict=True):
        before = tensors[key]
        rest = before.shape[1:] if key == pair.keys[0] else (rank, *before.shape[2:])
        tensors[key] = factor.reshape(len(factor), *rest).to(before.dtype).contiguous()
    return Shrunk(pair.place, len(pair.a), rank, float(values.square().sum()), kept_energy(values, rank))


def _with_ranks(method: LoRA, pairs: Sequence[StoredFactors], ranks: Mapping[str, int]) -> LoRA:
    """The method with the new ranks, and alphas that leave each strength as it is."""
    scales = {pair.owner: pair.scale for pair in pairs}
    alphas = {o: _number(scales[o] * (math.sqrt(k) if method.use_rslora else k)) for o, k in ranks.items()}
    ((usual, _),) = Counter((ranks[o], alphas[o]) for o in ranks).most_common(1)
    return replace(
        method,
        r=usual[0],
        lora_alpha=usual[1],
        # anchored, so that a module's name is no suffix of another's
        rank_pattern={f"^{re.escape(o)}$": k for o, k in ranks.items() if k != usual[0]},
        alpha_pattern={f"^{re.escape(o)}$": a for o, a in alphas.items() if a != usual[1]},
        # what LoftQ's factors make up for, they still do; what others start with is in the factors now
        init_lora_weights=method.init_lora_weights if method.needs_codes else True,
    )


def _number(alpha: float) -> float:
    near = round(alpha, 9)
    return int(near) if near.is_integer() else alpha


def _write_configs(source: Path, folder: Path, method: LoRA, tensors: Mapping[str, Tensor]) -> None:
    ours = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    if (source / PEFT_CONFIG).is_file():
        config = read_json(source / PEFT_CONFIG)
        write_json(folder / PEFT_CONFIG, {**config, **{k: getattr(method, k) for k in ours}})
    if (source / MANIFEST).is_file():
        manifest = read_json(source / MANIFEST)
        shapes = {k: list(t.shape) for k, t in sorted(tensors.items())}
        write_json(folder / MANIFEST, {**manifest, "method": method_to_config(method), "tensors": shapes})
