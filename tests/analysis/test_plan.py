"""The plan says what a person needs to know of an adapter, and nothing that has no meaning for its method."""

from __future__ import annotations

import pytest

from lightning_peft import (
    BottleneckAdapter,
    DeepPrompt,
    LadderSideTuning,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    Selective,
    adapt,
)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(r=2), True),
        (Selective(parameter_types=["bias"]), True),
        (BottleneckAdapter(reduction_factor=4), False),
        (DeepPrompt(), False),
        (LadderSideTuning(), False),
        (LoReFT(r=2), False),
        (PrefixTuning(3), False),
        (PromptTuning(3), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_many_linear_layers_are_reached_is_said_where_weights_change(build, method, said):
    assert ("linear layers" in str(adapt(build("bert"), method).plan)) is said
