"""The handle outside training: what it refuses and how it shows itself."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_peft import LoRA, PeftCallback, adapt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora", "a method such as LoRA\\(r=8\\) is expected, but got 'lora', a str"),
        (LoRA, "a method such as LoRA\\(\\) is expected, but got the class LoRA itself"),
        (None, "but got None"),
    ],
)
def test_what_is_no_method_is_refused_by_name(build, given, said):
    with pytest.raises(TypeError, match=said):
        adapt(build("bert"), given)
    with pytest.raises(TypeError, match=said):
        PeftCallback(given)


def test_the_class_of_a_model_is_told_apart_from_a_model():
    with pytest.raises(TypeError, match=r"works on a torch.nn.Module, but got the class Linear itself"):
        adapt(nn.Linear, LoRA())
    with pytest.raises(TypeError, match=r"works on a torch.nn.Module, but got a list"):
        adapt([], LoRA())


def test_a_handle_shows_its_name_method_and_model(build):
    adapter = adapt(build("bert"), LoRA(r=2))
    shown = repr(adapter)
    assert shown.startswith("Adapter('default', LoRA(r=2, ")
    assert shown.endswith("of BertForSequenceClassification)")
    adapter.remove()
    assert repr(adapter) == "Adapter('default', removed, of BertForSequenceClassification)"
    for call in (adapter.remove, adapter.merge, adapter.unmerge, adapter.merge_and_unload, lambda: adapter.save("x")):
        with pytest.raises(RuntimeError, match="the adapter 'default' has been removed"):
            call()
    assert repr(PeftCallback(LoRA(r=2), model="a")).startswith("PeftCallback(LoRA(r=2, ")


def test_the_submodule_of_the_callback_is_given_by_name():
    with pytest.raises(TypeError, match="must be the name of a submodule, such as 'backbone', but got 3"):
        PeftCallback(LoRA(), model=3)
