"""Compacter's weights against the paper's sum of Kronecker products."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_peft import Compacter, adapt
from lightning_peft.methods.compacter import phm


def test_the_product_is_that_with_the_papers_matrix():
    torch.manual_seed(0)
    rule, left, right = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4, 4), (4, 3, 2), (4, 2, 5)))
    matrix = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(4))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(phm(x, rule, left, right), x @ matrix)
    inputs = [t.requires_grad_() for t in (x[:1, :2].clone(), rule, left, right)]
    torch.autograd.gradcheck(phm, inputs)


def test_the_rule_is_one_for_all_layers_unless_asked_otherwise(build):
    shared = adapt(build("bert"), Compacter(reduction_factor=4))
    assert [n for n in shared.state_dict() if "phm_rule" in n] == ["phm_rule"]
    own = adapt(build("bert"), Compacter(reduction_factor=4, shared_phm_rule=False))
    assert len([n for n in own.state_dict() if n.endswith(("down_rule", "up_rule"))]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"phm_dim": 3, "reduction_factor": 4},
            "phm_dim=3 must divide the hidden size 32 and the bottleneck 8 .*nearest .* are 2 and 4",
        ),
        ({"phm_dim": 3, "reduction_factor": 32}, "phm_dim=3 must divide .* choose another phm_dim: only 1 does"),
        ({"reduction_factor": 16}, "phm_dim=4 must divide the hidden size 32 and the bottleneck 2 .* such as 8"),
        ({"non_linearity": "gelo"}, "non_linearity 'gelo' is unknown; did you mean 'gelu'"),
        ({"mh_adapter": False, "output_adapter": False}, "choose mh_adapter, output_adapter or both"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, build):
    with pytest.raises(ValueError, match=message):
        adapt(build("bert"), Compacter(**options))


@pytest.mark.parametrize(("hidden", "options"), [(64, {"phm_dim": 3}), (48, {"reduction_factor": 4.5}), (64, {})])
def test_the_number_that_a_refusal_names_fits(hidden, options):
    def model():
        return nn.Sequential(nn.Linear(hidden, hidden))

    def made(options):
        return Compacter(feed_forward_modules=["0"], mh_adapter=False, **options)

    with pytest.raises(ValueError, match=r"Compacter: phm_dim=\d must divide") as refusal:
        adapt(model(), made(options))
    option, number = re.search(r"choose another (\w+).*?(\d+)$", str(refusal.value)).groups()
    adapt(model(), made(options | {option: int(number)}))
