"""Layers that are left out of one forward, and of no other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from lightning_peft.core.frozen_layers import left_out, watching


class Alone(nn.Module):
    """A layer that gives its output alone in a tuple."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states, mask=None):
        return (torch.tanh(self.linear(hidden_states)),)


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.tuples = kind is Alone
        self.layers = nn.ModuleList(kind() if kind is Alone else nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if self.tuples else x
        return x


@pytest.mark.parametrize("kind", [Alone, nn.Linear])
def test_a_forward_without_its_first_layers_gives_the_same(kind):
    torch.manual_seed(0)
    model, x = Stack(kind), torch.randn(3, 4)
    model.layers[0].requires_grad_(False)
    model.layers[1].requires_grad_(False)
    with watching(model.layers) as seen:
        expected = model(x)
    assert seen.frozen == 2
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with left_out(model.layers[:2], [None, seen.states[1]], seen.in_tuples[:2]):
        assert torch.equal(model(torch.zeros(3, 4)), expected)
    assert torch.equal(model(x), expected)
    assert not any("forward" in layer.__dict__ for layer in model.layers)


def test_another_thread_and_a_forward_without_a_graph_run_all_layers():
    torch.manual_seed(0)
    model, x = Stack(nn.Linear), torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x)
    found = []

    def serve():
        found.append(model(x).detach())

    with left_out(model.layers[:2], [None, torch.zeros(3, 4)], [False, False]), watching(model.layers) as seen:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        with torch.no_grad():
            found.append(model(x))
        short = model(x)
    assert all(torch.equal(f, expected) for f in found)
    assert not torch.allclose(short, expected)
    assert len(seen.states) == 4
