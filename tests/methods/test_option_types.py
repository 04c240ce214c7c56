"""Options of another type than the annotated one are named when a method is made, whichever way it is made."""

from __future__ import annotations

import json
from collections import UserList
from dataclasses import replace

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lightning_peft
import lightning_peft.methods as methods
from lightning_peft import BottleneckAdapter, LoKr, LoRA, adapt
from lightning_peft.methods.config import method_from_config, method_to_config
from tests.method_table import TABLE


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (LoRA, {"r": "8"}, "^LoRA: r must be a whole number, but got '8'$"),
        (LoRA, {"r": True}, "r must be a whole number, but got True"),
        (LoRA, {"r": 8.0}, "r must be a whole number, but got 8.0"),
        (LoRA, {"use_dora": "yes"}, "use_dora must be true or false, but got 'yes'"),
        (LoRA, {"use_dora": 1}, "use_dora must be true or false, but got 1"),
        (LoRA, {"learning_rate": "1e-3"}, "learning_rate must be a number, but got '1e-3'"),
        (LoRA, {"learning_rate": None}, "learning_rate must be a number, but got None"),
        (LoRA, {"target_modules": 3}, "target_modules must be a list of strings or a string, but got 3"),
        (LoRA, {"target_modules": ["q", 3]}, r"a list of strings or a string, but got \['q', 3\]"),
        (LoRA, {"exclude_modules": 5}, "exclude_modules must be a list of strings, a string or None, but got 5"),
        (LoRA, {"modules_to_save": "head"}, "modules_to_save must be a list of strings or None, but got 'head'"),
        (
            LoRA,
            {"layers_to_transform": "1"},
            "layers_to_transform must be a list of whole numbers, a whole number or None, but got '1'",
        ),
        (LoRA, {"rank_pattern": {"q": "2"}}, "rank_pattern must be a dictionary from strings to whole numbers, but"),
        (LoRA, {"r": "8", "use_dora": "yes"}, "LoRA: r must be .*, but got '8'; use_dora must be .*, but got 'yes'"),
        (LoRA, {"lora_alpha": float("nan")}, "^LoRA: lora_alpha must be finite, but got nan$"),
        (LoRA, {"learning_rate": float("inf")}, "learning_rate must be finite, but got inf"),
        (LoRA, {"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern must be finite, but got \{'q': inf\}"),
        (LoRA, {"r": "8", "lora_dropout": float("nan")}, "r must be .*, but got '8'; lora_dropout must be finite"),
        (LoKr, {"init_weights": 3}, "init_weights must be true or false or a string, but got 3"),
        (BottleneckAdapter, {"reduction_factor": "2"}, "reduction_factor must be a number, but got '2'"),
    ],
)
def test_an_option_of_another_type_is_named_in_python_and_from_plain_values(cls, options, said):
    with pytest.raises(ValueError, match=said):
        cls(**options)
    with pytest.raises(ValueError, match=said):
        method_from_config({"_target_": f"lightning_peft.{cls.__name__}", **options})


METHODS = {type(method).__name__: method for method in (row.make() for row in TABLE)}


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_looks_at_types_before_values(name):
    with pytest.raises(ValueError, match=f"^{name}: learning_rate must be a number, but got 'fast'"):
        replace(METHODS[name], learning_rate="fast")


COUNTS = ("r", "target_r", "adapter_len", "phm_dim", "mini_r", "mask_batches", "encoder_num_layers")
POSITIVE = ("learning_rate", "lora_alpha", "randlora_alpha", "alpha", "reduction_factor", "temperature")
SHARES = ("dropout", "lora_dropout", "vera_dropout", "randlora_dropout", "miss_dropout", "rank_dropout")
RANGES = [(COUNTS, 0, "1 or more"), (POSITIVE, 0, "above 0"), (SHARES, 1.0, "at least 0 and below 1")]


@pytest.mark.parametrize("name", methods.__all__)
def test_a_number_outside_its_range_is_named_with_the_others(name):
    method = METHODS[name]
    given = [(o, v, said) for names, v, said in RANGES for o in names if hasattr(method, o)]
    given = [g for g in given if (name, g[0]) != ("OFT", "r")]  # where 0 is a choice
    with pytest.raises(ValueError, match=f"^{name}") as raised:
        replace(method, **{option: value for option, value, _ in given})
    for option, value, said in given:
        assert f"{option} must be {said}, but got {value}" in str(raised.value)


def test_a_whole_number_is_a_number():
    assert LoRA(lora_alpha=8, learning_rate=1).lora_alpha == 8


@pytest.mark.parametrize("given", [("query", "value"), UserList(["query", "value"])])
def test_a_tuple_and_another_librarys_list_arrive_as_a_list(build, given):
    method = LoRA(r=1, target_modules=given)
    assert method == LoRA(r=1, target_modules=["query", "value"])
    assert len(adapt(build("bert"), method).tree.record.layers) == 4


def test_lists_and_mappings_of_hydra_arrive_as_plain_ones_whether_it_converts_or_not():
    config = OmegaConf.create(
        {"_target_": "lightning_peft.LoRA", "target_modules": ["query"], "rank_pattern": {"query": 2}}
    )
    method = instantiate(config)
    assert type(method.target_modules) is list
    assert type(method.rank_pattern) is dict
    assert json.loads(json.dumps(method_to_config(method))) == method_to_config(instantiate(config, _convert_="all"))


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "BottleneckAdapter", "LoReFT", "Selective"])
def test_an_empty_list_of_layers_is_refused(build, name):
    with pytest.raises(ValueError, match="layers_to_transform is empty; name at least one layer, or leave it out"):
        adapt(build("bert"), getattr(lightning_peft, name)(layers_to_transform=[]))


@pytest.mark.parametrize("name", ["LoRA", "LoHa"])
def test_an_empty_list_of_modules_is_not_taken_for_all(build, name):
    with pytest.raises(ValueError, match="target_modules is empty"):
        adapt(build("bert"), getattr(lightning_peft, name)(target_modules=[]))
