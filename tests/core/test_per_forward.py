"""What a layer around a model passes to the layers inside for the length of a forward."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.per_forward import PerForward, _checkpointed


class Token:
    """Something that a forward passes, whose end can be seen."""


def _elsewhere(fn):
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def test_a_value_holds_inside_its_block_and_in_its_thread_only():
    passed = PerForward()
    seen = []
    with passed.passing(1):
        with contextlib.suppress(KeyError), passed.passing(2):
            assert passed.read() == 2
            raise KeyError
        assert passed.read() == 1
        _elsewhere(lambda: seen.append(passed.read()))
    assert passed.read() is None
    assert seen == [None]


def test_what_shares_one_shares_one_in_a_copy():
    passed = PerForward()
    for left, right in (copy.deepcopy((passed, passed)), pickle.loads(pickle.dumps((passed, passed)))):
        assert left is right
        with left.passing(1):
            assert right.read() == 1
            assert passed.read() is None


@pytest.mark.parametrize("thread", [True, False])
def test_a_checkpoint_that_runs_again_reads_what_its_own_forward_passed(thread):
    passed, seen = PerForward(), []

    def scaled(x):
        seen.append(passed.read())
        return (x * passed.read()).sin()

    x = torch.ones(3, requires_grad=True)
    outputs = []
    for factor in (2.0, 3.0):
        with passed.passing(factor):
            outputs.append(checkpoint(scaled, x, use_reentrant=False))
    loss = outputs[0].sum() + outputs[1].sum()
    with passed.passing(99.0):  # another forward is under way where the backward pass runs
        _elsewhere(loss.backward) if thread else loss.backward()
    assert sorted(seen) == [2.0, 2.0, 3.0, 3.0]
    torch.testing.assert_close(x.grad, 2 * torch.cos(2 * x.detach()) + 3 * torch.cos(3 * x.detach()))


def test_a_whole_forward_that_runs_again_passes_its_value_again():
    passed = PerForward()

    def model(x):
        with passed.passing(2.0):
            return (x * passed.read()).sin()

    x = torch.ones(3, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    _elsewhere(y.sum().backward)
    torch.testing.assert_close(x.grad, 2 * torch.cos(2 * x.detach()))


def test_nothing_is_kept_when_the_graph_is_gone():
    passed = PerForward()
    value = Token()
    end = weakref.ref(value)
    with passed.passing(value):
        y = checkpoint(
            lambda x: (x * 2, passed.read())[0].sin(), torch.ones(3, requires_grad=True), use_reentrant=False
        )
    del value
    assert end() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert end() is None
    assert not len(_checkpointed)
