"""Metrics that two processes fill, each with its rows, are those of one process that saw all rows."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torchmetrics import MetricCollection

from lightning_peft.tasks.entities import EntityScores
from lightning_peft.tasks.multi_label import MultiLabel
from lightning_peft.tasks.regression import Regression
from lightning_peft.tasks.retrieval import Retrieval
from lightning_peft.tasks.single_label import SingleLabel
from lightning_peft.tasks.written_texts import update_written, written_metrics

ROWS, FIRST = 23, 15  # ranks with unequal shares
CLASSES = ["a", "b", "c"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
TEXTS = ["the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "outside", "of", "our", "old", "house"]


def _rows(name):
    """Each row's arguments to the metrics' update, as batches of one row."""
    random = torch.Generator().manual_seed(0)

    def tags():
        return [TAGS[i] for i in torch.randint(len(TAGS), (5,), generator=random).tolist()]

    def text():
        return " ".join(TEXTS[i] for i in torch.randint(len(TEXTS), (6,), generator=random).tolist())

    makers = {
        "single label": lambda i: (torch.randn(1, 3, generator=random), torch.tensor([i % 3])),
        "several labels": lambda i: (torch.randn(1, 3, generator=random), torch.rand(1, 3, generator=random).round()),
        "numbers": lambda i: (torch.randn(1, 2, generator=random), torch.randn(1, 2, generator=random)),
        "entities": lambda i: ([tags()], [tags()]),
        "retrieval": lambda i: (
            torch.nn.functional.normalize(torch.randn(1, 4, generator=random)),
            torch.nn.functional.normalize(torch.randn(1, 4, generator=random)),
            torch.tensor([[i, 100 + i % 5]]),
        ),
        "written texts": lambda i: ([text()], [text()]),
    }
    return [makers[name](i) for i in range(ROWS)]


def _filled(name, rows):
    kinds = {"single label": SingleLabel, "several labels": MultiLabel, "numbers": Regression}
    if name in kinds:
        known = 2 if name == "numbers" else CLASSES
        kind = kinds[name](known, by_number=False)
        metrics = kind.metrics()
        for row in rows:
            kind.update(metrics, *row)
    elif name == "written texts":
        metrics = written_metrics()
        for row in rows:
            update_written(metrics, *row)
    else:
        metrics = MetricCollection({name: EntityScores(TAGS) if name == "entities" else Retrieval()})
        for row in rows:
            metrics.update(*row)
    return metrics


NAMES = ("single label", "several labels", "numbers", "entities", "retrieval", "written texts")


def _run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        rows = _rows(name)
        found[name] = _filled(name, rows[:FIRST] if rank == 0 else rows[FIRST:]).compute()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another one still gathers
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    """What each of two processes computes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_agree_on_the_values_of_one(across, name):
    expected = _filled(name, _rows(name)).compute()
    assert all(v.isfinite() for v in expected.values())
    for found in across:
        torch.testing.assert_close(found[name], expected)
