"""Where LoRA's factors start when they do not start at zero."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.quantized import dequantized, full_weight, is_quantized

CHANGING = ("orthogonal", "olora", "pissa")
"""Starts at which the product of the factors is not zero, or is so only up to rounding."""


_STARTS = "True, 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_<iterations>', 'eva', 'loftq'"


def start_problems(start: object, ranks: Sequence[int], *, fixed: bool) -> list[str]:
    """What is wrong with where LoRA's factors are to start, a sentence each.

    Args:
        start: the option ``init_lora_weights``.
        ranks: all that occur.
        fixed: whether A stays as it starts (``lora_fa``).
    """
    problems = []
    if not (start is True or start in ("gaussian", "eva", "loftq") or is_apart(start)):
        problems.append(f"init_lora_weights must be one of {_STARTS}, but got {start!r}")
    if start == "orthogonal" and any(r % 2 for r in ranks):
        problems.append("init_lora_weights='orthogonal' needs even ranks")
    if fixed and (is_apart(start) or start == "loftq"):
        problems.append(
            "lora_fa=True leaves A as it starts, so A must be drawn or taken from data: init_lora_weights True, "
            "'gaussian' or 'eva'"
        )
    return problems


def is_apart(name: object) -> bool:
    """Whether factors that start so differ from zero in their product."""
    return isinstance(name, str) and (name in CHANGING or re.fullmatch(r"pissa_niter_\d+", name) is not None)


def changed_base_problem(start: object) -> str | None:
    """What is wrong with a file of PEFT's whose factors stand beside weights that PEFT changed at the start.

    PEFT writes a plain start once it has converted such a file, so this one was not. ``"orthogonal"`` changes the base
    by rounding alone, ``"eva"``, ``"gaussian"`` and ``"mica"`` not at all.

    Args:
        start: the file's ``init_lora_weights``.
    """
    if not isinstance(start, str) or not start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        return None
    said = f"an adapter with init_lora_weights={start!r} is relative to a base that peft changed"
    if start == "loftq":
        return f"{said}, namely quantized; merge it in peft (merge_and_unload) and save that model"
    return f"{said}; save it in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA"


@torch.no_grad()
def starting_factors(name: str, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The factors A and B at the start.

    Args:
        name: ``"pissa"`` takes the weight's largest singular values, ``s B A = U_r S_r V_r^T`` (arXiv 2404.02948,
            3), ``"pissa_niter_4"`` the same by a randomized decomposition with 4 iterations; ``"olora"`` the first
            columns of its QR decomposition (arXiv 2406.01775, 3); ``"orthogonal"`` random factors whose rows lie
            in two halves of one random orthogonal basis, so that ``B A`` is zero and neither factor is.
        weight: ``(out, in)``.
        r: the rank; even for ``"orthogonal"``.
        scale: the factor ``s`` on the change.

    Returns:
        A: ``(r, in)`` and B: ``(out, r)``.
    """
    n_out, n_in = weight.shape
    if name == "orthogonal":
        basis, _ = torch.linalg.qr(torch.randn(r, r, device=weight.device))
        a = (torch.randn(n_in, r // 2, device=weight.device) @ basis[0::2]).T / 10
        return a.contiguous(), torch.randn(n_out, r // 2, device=weight.device) @ basis[1::2] / 10
    if name == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    iterations = name.removeprefix("pissa_niter_")
    if iterations != name:
        u, values, v = torch.svd_lowrank(weight, r, niter=int(iterations))
        vt = v.T
    else:
        u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:r] / scale).sqrt()
    # in rows, as the parameters lie: in columns the same product would be rounded otherwise
    return (root.unsqueeze(1) * vt[:r]).contiguous(), (u[:, :r] * root).contiguous()


@torch.no_grad()
def residual_factors(name: str, module: Any, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The factors whose product is nearest to what quantizing a weight has lost (LoftQ, arXiv 2310.08659, Alg. 1).

    The algorithm's first step: ``A`` and ``B`` are the largest singular values of ``W - q(W)``. Later steps would
    change the codes to ``q(W - s B A)``, and the base would be no longer what everybody gets who quantizes it.

    Args:
        name: the module's, for errors.
        module: a linear layer with a quantized weight.
        r: the rank.
        scale: the factor ``s`` on the change.

    Returns:
        A: ``(r, in)`` and B: ``(out, r)``.

    Raises:
        ValueError: if the weight is not quantized, or what it was before is not known.
    """
    weight = module.weight
    full = full_weight(weight) if is_quantized(weight) else None
    if full is None:
        unknown = (
            f"what {name!r} was before is not known: load the model by model.quantization, or say where its weights "
            "lie (lightning_peft.tasks.quantization.note_full_weights)"
        )
        plain = f"{name!r} is not quantized: load the model in 4 or 8 bits (model.quantization=nf4), or choose True"
        raise ValueError(
            "LoRA: init_lora_weights='loftq' starts as what quantizing has lost, but "
            + (unknown if is_quantized(weight) else plain)
        )
    u, values, vt = torch.linalg.svd(full - dequantized(module, weight), full_matrices=False)
    root = (values[:r] / scale).sqrt()
    return root.unsqueeze(1) * vt[:r], u[:, :r] * root


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with what it started from folded in: ``B A - B0 A0`` is one product of twice the rank.

    Args:
        tensors: by name; ``lora_A0`` and ``lora_B0`` are the start.
    """
    packed = {k: t for k, t in tensors.items() if not k.endswith(("lora_A0", "lora_B0"))}
    for key in [k for k in tensors if k.endswith("lora_A0")]:
        a, b = key.removesuffix("0"), key.removesuffix("A0") + "B"
        packed[a] = torch.cat([tensors[a], tensors[key]])
        packed[b] = torch.cat([tensors[b], -tensors[f"{b}0"]], 1)
    return packed


def halved(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors and their start out of what `doubled` made.

    Args:
        stored: by name.
    """
    tensors = dict(stored)
    for a in [k for k in stored if k.endswith("lora_A")]:
        b = a.removesuffix("A") + "B"
        (tensors[a], tensors[f"{a}0"]), (tensors[b], minus) = stored[a].chunk(2), stored[b].chunk(2, 1)
        tensors[f"{b}0"] = -minus
    return tensors
