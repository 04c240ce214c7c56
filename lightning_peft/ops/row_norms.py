"""How long the rows of a weight are once its low-rank change is added (DoRA, arXiv 2402.09353, 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # of a weight in another dtype that are cast at a time


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``|W + s B A|`` of each row, without building that matrix.

    ``|W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``, with the first taken out of the root: while ``B`` is zero the norm is
    that of ``W`` to the last bit.

    Args:
        weight: ``(out, in)``, in any dtype.
        a: ``(r, in)``; in its dtype it is computed.
        b: ``(out, r)``.
        scale: the factor ``s`` on the change.

    Returns:
        ``(out,)``, never zero, since it is divided by.
    """
    wider = max(weight.dtype, a.dtype, key=lambda dtype: dtype.itemsize)  # a norm is never taken in fewer bits
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wider).to(a.dtype)
    read = torch.cat([rows.to(a.dtype) @ a.T for rows in torch.split(weight, _ROWS)])
    both = ((2 * read + scale * (b @ (a @ a.T))) * b).sum(1) * scale
    found = torch.where(norm > 0, norm * (1 + both / norm.square()).sqrt(), both.sqrt())
    return found.clamp_min(torch.finfo(a.dtype).tiny)
