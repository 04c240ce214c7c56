"""The file of an adapter's tensors: what lies in memory as plain numbers, as it lies there."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_peft.formats.tensor_file import fitted, read_tensors, write_tensors


def test_tensors_that_share_memory_are_turned_or_empty_are_written_with_their_own_numbers(tmp_path):
    whole = torch.randn(3, 4)
    tensors = {
        "whole": whole,
        "tied": whole,
        "turned": whole.T,
        "part": whole[1:, ::2],
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 5),
        "half": whole.bfloat16(),
        "eight": whole.to(torch.float8_e4m3fn),
        "flags": whole > 0,
        "numbers": torch.arange(5),
    }
    write_tensors(tmp_path, tensors)
    for found in (load_file(tmp_path / "adapter_model.safetensors"), read_tensors(tmp_path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = file.metadata()
    assert found == {"format": "pt", "lightning_peft_format": "1"}  # without the first, transformers refuses a file


class Elsewhere(torch.Tensor):
    """As quantized and sharded tensors are: a shape whose numbers other tensors hold."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0]


def test_a_tensor_whose_numbers_lie_elsewhere_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'a.weight' is an Elsewhere, which holds no numbers of its own"):
        write_tensors(tmp_path, {"a.weight": Elsewhere(torch.ones(3))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_whose_sum_overflows_are_finite_and_infinities_that_cancel_are_not(tmp_path, dtype):
    large = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    fitted(tmp_path, {"a": large}, {"a": large})
    torn = torch.zeros(64, dtype=dtype)
    torn[3], torn[7] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match="has NaN or infinite values in a:"):
        fitted(tmp_path, {"a": torn}, {"a": torn})
