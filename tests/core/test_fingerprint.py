"""The base's fingerprint: over every value, the same on every machine, in every order and in bfloat16 or float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.core.fingerprint import fingerprint, fingerprints_of_parts, parameter_digests
from lightning_peft.core.in_place import base_parameters


def _reference(tensor: torch.Tensor) -> str:
    """The sum in Python's own whole numbers, after its docstring."""
    codes = [v & 0xFFFF for v in tensor.detach().reshape(-1).to(torch.bfloat16).view(torch.int16).tolist()]
    codes += [0] * (-len(codes) % 1024)
    total = 0
    for row in range(len(codes) // 1024):
        four = [codes[row * 1024 + i : row * 1024 + i + 4] for i in range(0, 1024, 4)]
        total += sum(sum(c << (16 * i) for i, c in enumerate(f)) for f in four) * (row * 0x3C6EF372FE94F82A + 1)
    return f"{total % 2**64:016x}"


class Holder(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.held = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])


def test_sums_are_those_of_whole_numbers_whatever_the_shape_dtype_and_place():
    torch.manual_seed(0)
    whole = torch.randn(1024 * 8 + 3).bfloat16()
    tensors = [
        torch.randn(5, 7),
        torch.randn(5, 7),  # of one shape with another: added up together
        torch.randn(3000),
        torch.randn(70, 100).T,
        torch.randn(64, 64).double(),
        torch.randint(0, 255, (9, 9), dtype=torch.uint8),
        whole[3:].view(8, 1024),  # begins within eight bytes
        torch.randn(3, 2**18 + 5),  # more than is rounded at once
    ]
    found = parameter_digests(base_parameters(Holder(*tensors)))
    assert [found[f"held.{i}"] for i in range(len(tensors))] == [(str(tuple(t.shape)), _reference(t)) for t in tensors]


@pytest.mark.parametrize("place", [0, 1, 777, 5000, 2**18 - 1, 2**18, 2**18 + 4097])
def test_any_value_that_changes_is_seen(place):
    values = torch.randn(2**18 + 5000, generator=torch.Generator().manual_seed(0))
    before = parameter_digests(base_parameters(Holder(values.clone())))
    changed = values.clone()
    changed[place] *= 1.01
    assert parameter_digests(base_parameters(Holder(changed))) != before
    assert parameter_digests(base_parameters(Holder(values.bfloat16()))) == before
    # rows that change places
    swapped = values.clone()
    swapped[:1024], swapped[1024:2048] = values[1024:2048], values[:1024]
    assert parameter_digests(base_parameters(Holder(swapped))) != before


def test_parts_are_layers_and_what_stands_beside_them(build):
    model = build("llama")
    digests = parameter_digests(base_parameters(model))
    parts = fingerprints_of_parts(digests, ["lm_head.weight"])
    assert list(parts) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.5
    now = fingerprints_of_parts(parameter_digests(base_parameters(model)), ["lm_head.weight"])
    assert [p for p in parts if parts[p] != now[p]] == ["model.layers.1"]
    assert fingerprint(digests, ()) != fingerprint(parameter_digests(base_parameters(model)), ())
