"""A new adapter out of several."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_peft.core.activation import activate
from lightning_peft.core.adapters import require_adapters
from lightning_peft.core.in_place import base_tensors
from lightning_peft.core.inject import eject, inject
from lightning_peft.core.matching import is_within
from lightning_peft.core.problems import an, nearest, raise_problems
from lightning_peft.core.tree import AdapterTree
from lightning_peft.handle import Adapter
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.lora_combine import COMBINATIONS, Combination, combined, combined_factors


def combine(
    model: Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str = "cat",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    """Makes a new LoRA adapter out of several of the model's and activates it; the others stay as they are.

    With ``D_i = s_i B_i A_i`` the change of adapter i, for each module:

    - ``"cat"``: ``sum_i w_i D_i`` exactly; the ranks add up, to at most the smaller side of the weight.
    - ``"svd"``: the nearest change of rank ``svd_rank`` to that sum.
    - ``"linear"``: ``(sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i)``, which is not that sum: cheap and rough.
    - ``"ties_svd"`` (arXiv 2306.01708), ``"dare_linear_svd"``, ``"dare_ties_svd"`` (arXiv 2311.03099),
      ``"magnitude_prune_svd"``: on the ``D_i``, then the nearest change of rank ``svd_rank``.
    - ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``: on the factors each by itself.

    Modules that train as copies (``modules_to_save``, new heads) are combined in the same way by what they differ
    from the base, without factors.

    Args:
        model: the root of an adapted model.
        names: LoRA adapters on the same modules.
        weights: one each, of any sign.
        name: of the new adapter.
        combination_type: one of the above.
        svd_rank: rank of the result for ``"svd"`` and the names in ``_svd``, from 1 to the smaller side of any
            weight; None takes the highest of the combined adapters, and where a weight is smaller its side.
        density: share of the values that TIES, DARE and magnitude pruning keep, above 0 and at most 1.
        seed: for what DARE drops.

    Returns:
        The new adapter's handle.

    Raises:
        ValueError: if an adapter is unknown, merged, no plain LoRA or on other modules, the name is taken, or an
            option is out of its range; nothing is changed then.

    Example:
        >>> from torch import nn
        >>> from lightning_peft import LoRA, adapt
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> for task in ("a", "b"):
        ...     _ = adapt(model, LoRA(r=2), task)
        >>> combine(model, ["a", "b"], [0.7, 0.3], "both").method.r
        4
    """
    adapters = require_adapters(model, names)
    _check_options(names, weights, combination_type, svd_rank, density)
    trees = [adapters.trees[n] for n in names]
    _check_adapters(names, trees)
    merged = [n for n in names if n in adapters.merged]
    if merged:
        raise ValueError(f"combine: the adapter {merged[0]!r} is merged; unmerge() it first")
    _refuse_rank(svd_rank, names, trees)
    how, kept = COMBINATIONS[combination_type], 1.0 if density is None else density
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for place, a_key, b_key, factors, scales in _factors(names, trees):
        flat = [(a.flatten(1), b.flatten(1)) for a, b in factors]
        try:
            a, b = combined_factors(flat, scales, weights, how, svd_rank, kept, generator)
        except ValueError as error:
            raise ValueError(
                f"combine: at {place!r} {error}, so {combination_type!r} cannot combine the factors; take 'cat', "
                "'svd' or a name in '_svd'"
            ) from error
        ranks[place] = len(a)
        state[a_key] = a.reshape(len(a), *factors[0][0].shape[1:]).float()
        state[b_key] = b.reshape(len(b), len(a), *factors[0][1].shape[2:]).float()
    state |= _copies(model, trees, weights, how, kept, generator)

    tree = inject(model, _method(trees[0], ranks), name, active=False)
    try:
        tree.load_state_dict(state)
    except BaseException:
        eject(model, name)
        raise
    activate(model, name)
    return Adapter(model, name)


def _check_options(
    names: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
) -> None:
    known = COMBINATIONS.get(combination_type)
    problems = [
        None if names else "name at least one adapter",
        None if len(names) == len(weights) else f"got {len(weights)} weights for {len(names)} adapters",
        _weights_problem(weights),
    ]
    if known is None:
        near = nearest(combination_type, COMBINATIONS, loosely=False)
        problems.append(f"combination_type {combination_type!r} is unknown{near}")
    else:
        sparse, ranked = known.sparsify is not None, known.of_products
        if sparse and (density is None or not 0 < density <= 1):
            problems.append(f"{combination_type!r} needs a density above 0 and at most 1, but got {density}")
        if not sparse and density is not None:
            problems.append(f"{combination_type!r} keeps every value, so it takes no density")
        if svd_rank is not None and not ranked:
            problems.append(f"{combination_type!r} takes no svd_rank; its rank follows from the adapters'")
        if svd_rank is not None and svd_rank < 1:
            problems.append(f"svd_rank must be 1 or more, but got {svd_rank}")
    raise_problems("combine", problems)


def _weights_problem(weights: Sequence[Any]) -> str | None:
    if not all(hasattr(w, "__float__") for w in weights):  # what a text lacks
        return f"weights must be numbers, but got {list(weights)}"
    return None if all(math.isfinite(w) for w in weights) else f"weights must be finite, but got {list(weights)}"


def _refuse_rank(svd_rank: int | None, names: Sequence[str], trees: Sequence[AdapterTree]) -> None:
    """Refuses a rank that some weight has no room for."""
    sides = {place: min(len(b), a[0].numel()) for place, _, _, ((a, b), *_), _ in _factors(names, trees)}
    if svd_rank is None or svd_rank <= min(sides.values(), default=svd_rank):
        return
    place, limit = min(sides.items(), key=lambda item: item[1])
    raise ValueError(
        f"combine: svd_rank={svd_rank} is above {limit}, the smaller side of the weight of {place!r}; lower it to "
        f"{limit} or less, or leave it out, which takes no more for a weight than it has room for"
    )


def _check_adapters(names: Sequence[str], trees: Sequence[AdapterTree]) -> None:
    first = trees[0].record
    for name, record in zip(names, (t.record for t in trees), strict=True):
        method = record.method
        if not isinstance(method, LoRA):
            raise ValueError(f"combine works on LoRA adapters, but {name!r} is {an(type(method).__name__)}")
        reasons = (
            ("a DoRA, whose lengths do not add up", method.use_dora),
            ("a LoRA with lora_bias=True, which has more than two factors", method.lora_bias),
            ("a LoRA with trained token rows, which are no factors", method.trainable_token_indices is not None),
            (f"training {record.in_place[:1]} of the base in place, which all adapters share", bool(record.in_place)),
        )
        reason = next((text for text, holds in reasons if holds), None)
        if reason is not None:
            raise ValueError(f"combine: the adapter {name!r} is {reason}")
        for what, mine, others in (
            ("layers", record.layers, first.layers),
            ("copies of modules", record.copies, first.copies),
        ):
            if mine != others:
                differing = sorted(set(mine) ^ set(others))[0]
                owner = name if differing in mine else names[0]
                raise ValueError(
                    f"combine: the adapters {names[0]!r} and {name!r} have {what} in different places; only {owner!r} "
                    f"has {differing!r}"
                )


def _factors(
    names: Sequence[str], trees: Sequence[AdapterTree]
) -> Iterator[tuple[str, str, str, list[tuple[Tensor, Tensor]], list[float]]]:
    """For each pair of factors: the module with the layer, both keys, the factors and the scales by adapter."""
    states: list[dict[str, Tensor]] = []
    for tree in trees:
        method: Any = tree.record.method
        states.append(method.to_peft(tree.state_dict()))
    own = [k for k in states[0] if not is_within(k, trees[0].record.copies)]
    for a_key in [k for k in own if k.endswith("_A")]:
        b_key = a_key.removesuffix("A") + "B"
        place = next(p for p in trees[0].record.layers if is_within(a_key, [p]))
        factors = [(s[a_key], s[b_key]) for s in states]
        for name, (a, b) in zip(names, factors, strict=True):
            if b.flatten(1).shape[1] != len(a):
                raise ValueError(f"combine: the layer of {name!r} at {place!r} is no product of two matrices")
        layers: list[Any] = [t.layers_by_module[place] for t in trees]
        yield place, a_key, b_key, factors, [layer.scale for layer in layers]


def _copies(
    model: Module,
    trees: Sequence[AdapterTree],
    weights: Sequence[float],
    how: Combination,
    density: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The tensors of modules that train as copies, combined by what they differ from the base."""
    base = base_tensors(model)
    states = [t.state_dict() for t in trees]
    trained = {n for n, _ in trees[0].named_parameters()}
    state: dict[str, Tensor] = {}
    for key in [k for k in states[0] if is_within(k, trees[0].record.copies)]:
        tensors = [s[key] for s in states]
        if key in trained:
            start = base[key].detach().double()
            changes = [t.double() - start for t in tensors]
            state[key] = (start + combined(changes, weights, how, density, generator)).to(tensors[0].dtype)
        elif all(torch.equal(t, tensors[0]) for t in tensors):
            state[key] = tensors[0]
        else:
            raise ValueError(f"combine: {key!r} is a statistic that differs between the adapters, not a trained value")
    return state


def _method(tree: AdapterTree, ranks: dict[str, int]) -> LoRA:
    """The first adapter's method with the ranks of the result; every scale is 1."""
    method: Any = tree.record.method
    r = max(ranks.values())
    # anchored, so that a module's name is no suffix of another's
    own = {f"^{re.escape(place)}$": rank for place, rank in ranks.items() if rank != r}
    made: LoRA = replace(
        method,
        r=r,
        lora_alpha=float(r),
        use_rslora=False,
        rank_pattern=own,
        alpha_pattern={pattern: float(rank) for pattern, rank in own.items()},
        init_lora_weights=True,
        lora_fa=False,
    )
    return made
