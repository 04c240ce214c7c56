"""IA3's own choice of modules, where names alone decide."""

from __future__ import annotations

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
