"""Threads that serve predictions while another one changes the adapters: each answer is the old or the new one's."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_peft import (
    Adapter,
    BottleneckAdapter,
    LoRA,
    activate,
    active_adapters,
    adapt,
    adapter_names,
    combine,
    load_adapter,
)


class Deep(nn.Module):
    """Layers between which other threads get their turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            time.sleep(0)
        return x


X = torch.linspace(-1, 1, 6)[None]
METHODS = {
    "lora": lambda: LoRA(r=2),
    "bottleneck": lambda: BottleneckAdapter(attention_modules=r"layers\.\d", output_adapter=False, reduction_factor=2),
}


def fill(adapter: Adapter, by: float) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(by)


@pytest.fixture
def saved(tmp_path):
    """Folders of adapters by the number that all of their parameters are."""

    def make(by: float, method: str = "lora"):
        folder = tmp_path / f"{method}-{by}"
        if not folder.exists():
            adapter = adapt(Deep(), METHODS[method]())
            fill(adapter, by)
            adapter.save(folder)
        return folder

    return make


def answer(*folders) -> torch.Tensor:
    """What a model says with adapters that nobody changes."""
    model = Deep()
    for number, folder in enumerate(folders):
        load_adapter(model, folder, f"adapter-{number}")
    with torch.no_grad():
        return model(X)


@contextmanager
def serving(ask: Callable[[], torch.Tensor], threads: int = 3):
    """Threads that ask over and over; gives the list of their answers, and raises what one of them raised."""
    answers, failed, over = [], [], threading.Event()

    def serve() -> None:
        try:
            with torch.no_grad():
                while not over.is_set():
                    answers.append(ask())
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=serve) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in running:
            thread.join(60)
    assert not any(thread.is_alive() for thread in running)
    if failed:
        raise failed[0]


def assert_only(answers, *right: torch.Tensor) -> None:
    """Each answer is one of the right ones, and each of those was given."""
    found = torch.cat(answers)
    near = torch.stack([torch.isclose(found, r, rtol=1e-4, atol=1e-5).all(1) for r in right])
    assert near.any(0).all(), f"{int((~near.any(0)).sum())} of {len(found)} answers are mixtures"
    assert near.any(1).all()


def until(answers, more: int = 4) -> None:
    """Lets the threads go on until they have given some more answers."""
    count, end = len(answers) + more, time.monotonic() + 60
    while len(answers) < count and time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.parametrize("method", METHODS)
def test_a_switched_adapter_is_seen_whole(method, saved):
    model, folders = Deep(), [saved(0.2, method), saved(0.4, method)]
    right = [answer(folder) for folder in folders]
    for name, folder in zip("ab", folders, strict=True):
        load_adapter(model, folder, name)
    activate(model, "a")
    with serving(lambda: model(X)) as answers:
        for name in itertools.islice(itertools.cycle("ba"), 60):
            activate(model, name)
            until(answers, 2)
    assert_only(answers, *right)


def test_an_adapter_that_is_loaded_acts_when_its_numbers_are_there(saved):
    model, folders = Deep(), [saved(0.2), saved(0.4)]
    load_adapter(model, folders[0], "a")
    with serving(lambda: model(X)) as answers:
        for number in range(30):
            until(answers)
            load_adapter(model, folders[1], f"new-{number}")
            until(answers)
            activate(model, "a")
            Adapter(model, f"new-{number}").remove()
    assert_only(answers, answer(folders[0]), answer(folders[1]))
    assert active_adapters(model) == ("a",)


def test_an_adapter_that_is_removed_and_loaded_anew_under_its_name_is_seen_whole(saved):
    """While it is gone the base answers."""
    model, folders = Deep(), [saved(0.2), saved(0.4)]
    load_adapter(model, saved(0.1), "resident")
    activate(model)
    with serving(lambda: model(X)) as answers:
        for folder in itertools.islice(itertools.cycle(folders), 40):
            load_adapter(model, folder, "a")
            until(answers)
            Adapter(model, "a").remove()
    assert_only(answers, answer(), answer(folders[0]), answer(folders[1]))


def test_the_last_adapter_leaves_when_the_forwards_that_have_it_are_over(saved):
    folder = saved(0.2)
    for _ in range(20):
        model = Deep()
        adapter = load_adapter(model, folder)
        with serving(lambda model=model: model(X)) as answers:
            until(answers)
            adapter.remove()
            until(answers)
        assert_only(answers, answer(), answer(folder))
        assert type(model) is Deep


def test_an_adapter_that_is_combined_acts_when_its_numbers_are_there(saved):
    model = Deep()
    for name, by in (("a", 0.2), ("b", 0.4)):
        load_adapter(model, saved(by), name)
    activate(model, "a")
    sums = Deep()
    for name, by in (("a", 0.2), ("b", 0.4)):
        load_adapter(sums, saved(by), name)
    combine(sums, ["a", "b"], [0.5, 0.5], "c", combination_type="cat")
    with serving(lambda: model(X)) as answers:
        for number in range(20):
            until(answers)
            combine(model, ["a", "b"], [0.5, 0.5], f"c-{number}", combination_type="cat")
            until(answers)
            activate(model, "a")
            Adapter(model, f"c-{number}").remove()
    with torch.no_grad():
        assert_only(answers, answer(saved(0.2)), sums(X))


def test_adapters_of_ones_own_come_and_go_in_several_threads(saved):
    """Each thread loads an adapter, asks with it alone and removes it, as a server of many customers does."""
    model, folders = Deep(), [saved(by) for by in (0.1, 0.2, 0.3, 0.4)]
    right = [answer(folder) for folder in folders]
    load_adapter(model, folders[0], "resident")
    activate(model)
    wrong = []

    @torch.no_grad()
    def customer(number: int) -> None:
        for turn in range(15):
            name = f"customer-{number}-{turn}"
            load_adapter(model, folders[number], name)
            for _ in range(3):
                with adapter_names(model, [name, None]):
                    found = model(torch.cat([X, X]))
                if not torch.allclose(found, torch.cat([right[number], answered]), rtol=1e-4, atol=1e-5):
                    wrong.append(name)
            Adapter(model, name).remove()

    answered = answer()
    threads = [threading.Thread(target=customer, args=[number]) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert list(model.adapters) == ["resident"]


def test_a_text_is_written_by_one_adapter_though_it_is_switched_meanwhile(build, perturb):
    model = build("llama")
    for name, by in (("a", 0.5), ("b", -0.5)):
        perturb(adapt(model, LoRA(r=4), name), by)
    ids = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    right = []
    for name in "ab":
        activate(model, name)
        right.append(model.generate(ids, **options))
    assert not torch.equal(*right)
    with serving(lambda: model.generate(ids, **options), threads=1) as answers:
        for name in itertools.islice(itertools.cycle("ab"), 60):
            activate(model, name)
            time.sleep(0.01)
        until(answers, 2)
    assert all(any(torch.equal(a, r) for r in right) for a in answers)


def test_an_adapter_is_not_removed_by_the_forward_that_runs_with_it():
    """It would wait for itself."""
    model = Deep()
    adapter = adapt(model, LoRA(r=2))
    handle = model.layers[3].register_forward_hook(lambda *_: adapter.remove())
    with pytest.raises(RuntimeError, match="'default' is running in this thread; let the forward end first"):
        model(X)
    handle.remove()
    assert active_adapters(model) == ("default",)
    adapter.remove()
    assert type(model) is Deep
