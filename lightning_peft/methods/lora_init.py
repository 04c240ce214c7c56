"""Where LoRA's factors start when they do not start at zero."""

from __future__ import annotations

import re

import torch
from torch import Tensor

CHANGING = ("orthogonal", "olora", "pissa")
"""Starts at which the product of the factors is not zero, or is so only up to rounding."""


def known_start(name: object) -> bool:
    """Whether LoRA can start so."""
    return name is True or name in ("gaussian", "eva") or is_apart(name)


def is_apart(name: object) -> bool:
    """Whether factors that start so differ from zero in their product."""
    return isinstance(name, str) and (name in CHANGING or re.fullmatch(r"pissa_niter_\d+", name) is not None)


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
    return root.unsqueeze(1) * vt[:r], u[:, :r] * root
