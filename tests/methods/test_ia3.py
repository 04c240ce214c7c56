"""IA3's own choice of modules, where names alone decide."""

from __future__ import annotations

import pytest

from lightning_peft import IA3, adapt


def test_attentions_output_layer_in_bert_is_scaled_at_its_input_as_in_peft(build):
    layers = adapt(build("bert"), IA3()).tree.layers_by_module
    shapes = {n.partition("layer.0.")[2]: tuple(x.ia3_l.shape) for n, x in layers.items() if "layer.0." in n}
    assert shapes == {
        "attention.self.key": (32, 1),
        "attention.self.value": (32, 1),
        "attention.output.dense": (1, 32),
        "output.dense": (1, 64),
    }


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["down_proj", "up_proj"], "'up_proj' in feedforward_modules names none of the target modules"),
        (r".*\.up_proj", r"feedforward_modules='.*up_proj' names none of the target modules"),
    ],
)
def test_a_feed_forward_module_that_is_no_target_is_refused(named, message, build):
    with pytest.raises(ValueError, match=message):
        adapt(build("llama"), IA3(target_modules=["k_proj", "down_proj"], feedforward_modules=named))
